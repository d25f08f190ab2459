"""Test the figures of the library on NLAs with known faults and on a target with planted concepts."""
