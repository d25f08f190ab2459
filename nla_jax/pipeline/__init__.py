"""A run from its config to its summary, and what commands do with bundles."""
