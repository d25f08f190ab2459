"""Programs over the library that ask whether its figures can be trusted."""
