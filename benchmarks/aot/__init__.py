"""The training steps compiled for a TPU that is not there: memory, work, communication, time."""
