"""Documents, splits, activations and explanations: everything on the host side of the data."""
