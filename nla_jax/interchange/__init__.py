"""Files of the official PyTorch release, read and written: models with their sidecars."""
