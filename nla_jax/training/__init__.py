"""The training loop, its batches, the jitted steps, and the display of a stage."""
