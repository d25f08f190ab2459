"""Compile the training steps for a TPU topology without a TPU: memory, work, communication, time."""
