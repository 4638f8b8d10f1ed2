"""Settings and their comments as a commented YAML file."""

from __future__ import annotations

import json
import re
import textwrap
from decimal import Decimal
from typing import Any

from nlgmoe.tools.megatron.job import Translation

_PLAIN = re.compile(r"[A-Za-z./][\w./-]*")
_SPECIAL = {"null", "true", "false", "yes", "no", "on", "off", "y", "n", "nan", "inf", "."}


def yaml_text(translation: Translation, source: str) -> str:
    """Return the text of the file.

    Args:
        translation: settings, comments and notes.
        source: of the launch, for the header.
    """
    lines = [
        f"# {source}, translated by `nlgmoe from-megatron`.",
        "#   python train.py fit --config THIS_FILE",
        *(line for note in translation.notes for line in _wrapped(note)),
    ]
    open_path: list[str] = []
    sections = list(dict.fromkeys(path.partition(".")[0] for path in translation.settings))
    in_order = sorted(translation.settings, key=lambda path: sections.index(path.partition(".")[0]))
    for path in in_order:
        parts, value = path.split("."), translation.settings[path]
        shared = 0
        while shared < min(len(open_path), len(parts) - 1) and open_path[shared] == parts[shared]:
            shared += 1
        for depth in range(shared, len(parts) - 1):
            if depth == 0 and open_path:
                lines.append("")
            lines.append(f"{'  ' * depth}{parts[depth]}:")
        open_path = parts[:-1]
        comment = f"  # {translation.comments[path]}" if path in translation.comments else ""
        indent = "  " * (len(parts) - 1)
        if isinstance(value, list) and value and isinstance(value[0], dict):
            lines.append(f"{indent}{parts[-1]}:{comment}")
            for item in value:
                first, *others = _block(item, f"{indent}    ")
                lines += [f"{indent}  - {first.lstrip()}", *others]
        else:
            lines.append(f"{indent}{parts[-1]}: {scalar(value)}{comment}")
    return "\n".join(lines) + "\n"


def scalar(value: Any) -> str:
    """Format a value on one line; quote text that YAML would read as another type."""
    if isinstance(value, list):
        return f"[{', '.join(scalar(item) for item in value)}]"
    if isinstance(value, float) and 0 < abs(value) < 1e-3:
        digits = Decimal(repr(value))
        mantissa = digits.scaleb(-digits.adjusted()).normalize()
        return f"{mantissa:f}{'' if '.' in f'{mantissa:f}' else '.0'}e{digits.adjusted()}"
    if type(value) is int and abs(value) >= 100_000:
        return f"{value:_}"
    if isinstance(value, str):
        return value if _PLAIN.fullmatch(value) and value.lower() not in _SPECIAL else json.dumps(value)
    return json.dumps(value)


def _wrapped(note: str) -> list[str]:
    return textwrap.wrap(note, 120, initial_indent="# ", subsequent_indent="#   ", break_on_hyphens=False)


def _block(item: dict[str, Any], indent: str) -> list[str]:
    """Format a mapping, one line for each value."""
    lines = []
    for name, value in item.items():
        if isinstance(value, dict):
            lines += [f"{indent}{name}:", *_block(value, f"{indent}  ")]
        else:
            lines.append(f"{indent}{name}: {scalar(value)}")
    return lines
