"""The README's table of flags, from the table that `nlgmoe from-megatron` translates by.

`python -m nlgmoe.megatron.flag_table` writes it into README.md (`make docs`).
"""

from __future__ import annotations

from pathlib import Path

from nlgmoe.megatron.flags import SECTIONS, Flag, Row

BEGIN = "<!-- flags: written by `make docs` from nlgmoe/megatron/flags.py -->"
END = "<!-- end of flags -->"


def with_table(readme: str) -> str:
    """The README with the table between its two markers brought up to date.

    Raises:
        ValueError: a marker is missing.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the README has no place for the table; put these lines around it:\n{BEGIN}\n{END}")
    return f"{before}{BEGIN}\n{markdown_table()}{END}{after}"


def markdown_table() -> str:
    """The README's table."""
    lines = ["| Megatron-DeepSpeed | here | note |", "|---|---|---|"]
    for title, rows in SECTIONS.items():
        lines.append(f"| **{title}** | | |")
        for row in rows:
            here = {"setting": row.here, "ignored": "not needed", "refused": "refused"}[row.kind]
            names = ", ".join(f"`{flag.name}`" + _exceptions(flag, row) for flag in row.flags)
            lines.append(f"| {names} | {here} | {row.note} |")
    return "\n".join(lines) + "\n"


def _exceptions(flag: Flag, row: Row) -> str:
    """The values of a refused flag that are fine."""
    return (
        f" (but {' or '.join(f'`{value}`' for value in flag.allowed)})"
        if row.kind == "refused" and flag.allowed
        else ""
    )


def main() -> None:
    """Bring README.md in the current folder up to date."""
    path = Path("README.md")
    path.write_text(with_table(path.read_text()))


if __name__ == "__main__":
    main()
