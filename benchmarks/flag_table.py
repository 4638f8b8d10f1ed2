"""Write the table of flags of docs/megatron_flags.md from nlgmoe/tools/megatron/flags.yaml: `make docs`."""

from __future__ import annotations

from benchmarks.documents import with_text
from benchmarks.runs import ROOT
from nlgmoe.tools.megatron.flags import IGNORED, REFUSED, TABLE

PAGE = ROOT / "docs/megatron_flags.md"
BEGIN = "<!-- flags: written by `make docs` from nlgmoe/tools/megatron/flags.yaml -->"
END = "<!-- end of flags -->"


def with_table(page: str) -> str:
    """Return the page with a new table between its two markers."""
    return with_text(page, BEGIN, END, table(), name=PAGE.name)


def table() -> str:
    """Return the table of the flags that are settings, and the lists of those that are not needed and refused."""
    lines, section = ["| Megatron-DeepSpeed | here | note |", "|---|---|---|"], ""
    for row in TABLE:
        is_listed = row.section in (IGNORED, REFUSED)
        if row.section != section:
            section = row.section
            lines += ["", f"### {section}", ""] if is_listed else [f"| **{section}** |"]
        names = []
        for name, keys in row.flags.items():
            allowed = " or ".join(f"`{value}`" for value in keys.get("allowed", ())) if section == REFUSED else ""
            names.append(f"`{name}`" + (f" (but {allowed})" if allowed else ""))
        if is_listed:
            lines.append(f"- {', '.join(names)}: {row.note.removesuffix('; remove it')}")
        else:
            lines.append(f"| {' | '.join(filter(None, [', '.join(names), row.here, row.note]))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
