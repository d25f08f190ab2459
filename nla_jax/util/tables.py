"""Tables in Markdown."""

from collections.abc import Iterable, Sequence


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table. A "|" in a cell is escaped."""
    cells = [[c.replace("|", "\\|") for c in r] for r in (head, *rows)]
    return [f"| {' | '.join(r)} |" for r in (cells[0], ["---"] * len(head), *cells[1:])]
