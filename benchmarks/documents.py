"""Write results into pages: a text between two of their lines, and Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def with_text(document: str, begin: str, end: str, text: str, name: str = "the document") -> str:
    """Return the document with `text` in place of the text between two of its lines.

    Raises:
        ValueError: a line is missing.
    """
    before, found, rest = document.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{name} lacks the lines {begin} and {end}; put them where the results belong")
    return f"{before}{begin}\n{text}\n{end}{after}"


def markdown_table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """Return a table; a cell that is None stays empty."""
    first, *rest = [f"| {' | '.join('' if cell is None else str(cell) for cell in row)} |" for row in (head, *rows)]
    return "\n".join([first, "|---" * len(head) + "|", *rest])
