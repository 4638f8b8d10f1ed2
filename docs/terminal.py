"""Draw docs/terminal.svg from the output of `make quickstart`: `make quickstart 2>&1 | tee LOG; python docs/terminal.py LOG`."""

import re
import sys
from io import StringIO
from pathlib import Path

from rich.console import Console
from rich.text import Text

text = Path(sys.argv[1]).read_text(encoding="utf-8").replace(f"{Path.cwd()}/", "")
lines = [re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", line.rstrip("\r").rpartition("\r")[2]) for line in text.splitlines()]
lines = ["", *lines[next(number for number, line in enumerate(lines) if line.startswith("2 of 2")) :]]
shown = [
    line.rstrip() for line in lines if not re.match(r"(real|user|sys)\t|make|Validation|Training|GPU|\.venv", line)
]
console = Console(record=True, width=112, file=StringIO())
console.print(Text("$ make quickstart", style="bold"))
for line, previous in zip(shown, ["", *shown], strict=False):
    if line or (previous and not previous.startswith("step ")):
        console.print(Text(line))
console.save_svg(str(Path(__file__).with_name("terminal.svg")), title="nlgmoe")
