"""Create matplotlib figures without a display and without pyplot's global state."""

from nla_jax.errors import UserError


def require_matplotlib():
    """Return matplotlib's class Figure. Raises UserError if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise UserError("matplotlib is missing: pip install 'nla_jax[report]'") from e
    return Figure


def new_figure(n_rows: int, n_columns: int, inches: tuple[float, float]):
    """Return (figure, its axes as a flat array). Raises UserError if matplotlib is not installed."""
    figure = require_matplotlib()(figsize=inches)
    return figure, figure.subplots(n_rows, n_columns, squeeze=False).ravel()
