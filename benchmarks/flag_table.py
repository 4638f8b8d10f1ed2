"""Write the table of flags of docs/megatron_flags.md from nlgmoe/tools/megatron/flags.yaml: `make docs`."""

from __future__ import annotations

from benchmarks.documents import with_text
from benchmarks.runs import ROOT
from nlgmoe.tools.megatron.flags import markdown_table

PAGE = ROOT / "docs/megatron_flags.md"
BEGIN = "<!-- flags: written by `make docs` from nlgmoe/tools/megatron/flags.yaml -->"
END = "<!-- end of flags -->"


def with_table(page: str) -> str:
    """Return the page with a new table between its two markers."""
    return with_text(page, BEGIN, END, markdown_table(), name=PAGE.name)


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
