"""Utilities for every other package: paths, checkpoints, processes, logs. They import none of them."""
