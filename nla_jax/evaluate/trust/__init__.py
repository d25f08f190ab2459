"""Estimate, without the source text, how likely each claim of an explanation is true."""
