"""List the differences between two mappings: the settings of a checkpoint and of a run, or the shapes of their tensors."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Any

_MISSING = "missing"
_EXPERT = re.compile(r"\.experts\.\d+\.")


def list_differences(
    saved: Mapping[str, Any], current: Mapping[str, Any], ignore: Collection[str] = (), limit: int | None = 5
) -> list[str]:
    """Return `name (saved: value, now: value)` for each value that differs; one that a mapping lacks is "missing".

    Values of nested mappings have dotted names. Lines with a missing value come last. Experts of a layer that differ alike share
    a line: `blocks.1.moe.experts.*.expand_bias (saved: missing, now: [64]; 4 experts)`.

    Args:
        ignore: names that are not compared, at any depth.
        limit: number of lines, after which follows "and N more"; None: all lines.
    """
    pairs = sorted(_pairs(saved, current, ignore, ""), key=lambda pair: _MISSING in pair[1:])
    counts = Counter((_EXPERT.sub(".experts.*.", name), old, new) for name, old, new in pairs)
    lines = [
        f"{name} (saved: {old}, now: {new}{f'; {count} experts' if '.*.' in name else ''})"
        for (name, old, new), count in counts.items()
    ]
    return lines if limit is None or len(lines) <= limit else [*lines[:limit], f"and {len(lines) - limit} more"]


def _pairs(
    saved: Mapping[str, Any], current: Mapping[str, Any], ignore: Collection[str], prefix: str
) -> Iterator[tuple[str, str, str]]:
    """Yield the name and both values of each difference, as text."""
    for name in {**current, **saved}:
        if name in ignore:
            continue
        old, new = saved.get(name, _MISSING), current.get(name, _MISSING)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _pairs(old, new, ignore, f"{prefix}{name}.")
        elif old != new:
            old, new = (
                str(list(value) if isinstance(value, tuple) else value) for value in (old, new)
            )  # torch.Size too
            yield prefix + name, old, new
