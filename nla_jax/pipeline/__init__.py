"""The stages of a run, from its config to its summary, and the evaluation of bundles."""
