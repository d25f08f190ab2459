"""Show runs and explanations: reports, charts, the terminal, the explorer."""
