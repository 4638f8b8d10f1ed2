"""Write the lists of flags of docs/megatron_flags.md from nlgmoe/tools/megatron/flags.yaml: `make docs`."""

from __future__ import annotations

from benchmarks.documents import with_text
from benchmarks.runs import ROOT
from nlgmoe.tools.megatron.flags import REFUSED, TABLE

PAGE = ROOT / "docs/megatron_flags.md"
BEGIN = "<!-- flags: written by `make docs` from nlgmoe/tools/megatron/flags.yaml -->"
END = "<!-- end of flags -->"


def with_table(page: str) -> str:
    """Return the page with new lists between its two markers."""
    return with_text(page, BEGIN, END, table(), name=PAGE.name)


def table() -> str:
    """Return a list for each section: the flags that are settings, those that are not needed, and those refused."""
    lines, section = [], ""
    for row in TABLE:
        if row.section != section:
            section = row.section
            lines += ["", f"### {section}", ""]
        names = []
        for name, keys in row.flags.items():
            allowed = " or ".join(f"`{value}`" for value in keys.get("allowed", ())) if section == REFUSED else ""
            names.append(f"`{name}`" + (f" (but {allowed})" if allowed else ""))
        meaning = "; ".join(filter(None, [row.here, row.note.removesuffix("; remove it")]))
        lines.append(f"- {', '.join(names)}: {meaning}")
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
