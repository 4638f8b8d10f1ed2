"""Write the documents' tables of flags, from the table that `nlgmoe from-megatron` translates by.

README.md has those of experts and distillation, docs/megatron_flags.md all of them; `make docs` writes both.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.documents import with_text
from nlgmoe.tools.megatron.flags import SECTIONS, Flag, Row

BEGIN = "<!-- flags: written by `make docs` from nlgmoe/tools/megatron/flags.py -->"
END = "<!-- end of flags -->"


DOCUMENTS: dict[str, list[str]] = {
    "README.md": ["Experts", "Distillation"],
    "docs/megatron_flags.md": list(SECTIONS),
}  # document -> titles of its sections


def with_table(document: str, titles: list[str]) -> str:
    """Return a document with a new table between its two markers.

    Raises:
        ValueError: a marker is missing.
    """
    return with_text(document, BEGIN, END, markdown_table(titles))


def markdown_table(titles: list[str]) -> str:
    """Return the rows of some sections."""
    lines = ["| Megatron-DeepSpeed | here | note |", "|---|---|---|"]
    for title in titles:
        lines.append(f"| **{title}** | | |")
        for row in SECTIONS[title]:
            here = {"setting": row.here, "ignored": "not needed", "refused": "refused"}[row.kind]
            names = ", ".join(f"`{flag.name}`" + _exceptions(flag, row) for flag in row.flags)
            lines.append(f"| {names} | {here} | {row.note} |")
    return "\n".join(lines)


def _exceptions(flag: Flag, row: Row) -> str:
    """Return the values with which a refused flag is accepted."""
    return (
        f" (but {' or '.join(f'`{value}`' for value in flag.allowed)})"
        if row.kind == "refused" and flag.allowed
        else ""
    )


def main() -> None:
    """Write the tables into the documents of the current folder."""
    for name, titles in DOCUMENTS.items():
        path = Path(name)
        path.write_text(with_table(path.read_text(encoding="utf-8"), titles), encoding="utf-8")


if __name__ == "__main__":
    main()
