"""Write results into documents."""


def with_text(document: str, begin: str, end: str, text: str, name: str = "the document") -> str:
    """Return the document with `text` in place of what is between two of its lines.

    Raises:
        ValueError: a line is missing.
    """
    before, found, rest = document.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{name} lacks the lines {begin} and {end}; put them where the results belong")
    return f"{before}{begin}\n{text}\n{end}{after}"
