"""The training loop, what it is fed, and the jitted steps."""
