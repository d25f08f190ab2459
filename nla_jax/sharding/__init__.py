"""The mesh, and where values stand on it."""
