"""Format figures as a table, for a terminal and in Markdown."""

from nla_jax.evaluate.probe_types import Figure
from nla_jax.util.tables import markdown_table


def split_title(split: str, note: str) -> str:
    """Return a split's name, and in brackets the first words of its note (`store.split_notes`), if any."""
    return f"{split} ({note.partition(':')[0]})" if note else split


def table(columns: dict[str, list[Figure]], title: str):
    """Make a rich table with one column of values for each named list of figures."""
    from rich.markup import escape
    from rich.table import Table

    head, rows = _rows(columns)
    out = Table(title=escape(title))
    for i, name in enumerate(head):
        # Without overflow="fold", rich cuts a name that is wider than its column.
        out.add_column(name, justify="right" if 0 < i <= len(columns) else "left", overflow="fold")
    for row in rows:
        out.add_row(*row)
    return out


def markdown(columns: dict[str, list[Figure]]) -> list[str]:
    """Return the same table as lines of Markdown."""
    return markdown_table(*_rows(columns))


def _rows(columns: dict[str, list[Figure]]) -> tuple[list[str], list[list[str]]]:
    """Return (head, rows) of the table; the last column is `Figure.reference`, if any figure has one."""
    names = list(dict.fromkeys(f.name for fs in columns.values() for f in fs))
    by_name = [[next((f for f in fs if f.name == n), None) for fs in columns.values()] for n in names]
    about = [next(f for f in found if f) for found in by_name]
    rows = [[f.name, *map(cell, found), f.asks] for f, found in zip(about, by_name, strict=True)]
    head = ["figure", *columns, "what it asks"]
    if any(f.reference for f in about):
        return [*head, "elsewhere"], [[*r, f.reference] for r, f in zip(rows, about, strict=True)]
    return head, rows


def cell(f: Figure | None) -> str:
    """Format a value with its interval; "" for None."""
    if f is None:
        return ""
    text = f"{f.value:.3f}"
    return text if f.low is None else f"{text} [{f.low:.3f}, {f.high:.3f}]"
