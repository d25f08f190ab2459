"""The host side of the data: documents, splits, activations and explanations."""
