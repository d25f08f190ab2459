"""What every other package may use: paths, checkpoints, processes, logs. It uses none of them."""
