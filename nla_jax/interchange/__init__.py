"""Import and export of the official PyTorch release's files: models and data, with their sidecars."""
