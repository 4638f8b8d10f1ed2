"""How many processes a setting starts, and their limit: far too many make the machine hang without an error."""

from __future__ import annotations

import os
from typing import Any

from nlgmoe.validation import SettingError, require


def usable_cpus() -> int:
    """Return the number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def named_devices(devices: Any) -> int | None:
    """Return the ranks per node of Lightning's `devices`: a number, indices, or text of either; None for "auto" and -1."""
    words = devices if isinstance(devices, list) else str(devices or "auto").strip("[] ").rstrip(",").split(",")
    if words in (["auto"], ["-1"], [-1]):
        return None
    if not all(str(word).strip().isdigit() for word in words):
        raise SettingError(f"trainer.devices={devices} is no number of GPUs and no list of indices; correct it")
    return len(words) if isinstance(devices, list) or "," in str(devices) else int(words[0])


def check_processes(setting: str, number: int) -> None:
    """Check a number of processes to start."""
    cpus = usable_cpus()
    limit = max(64, 8 * cpus)
    require(
        number <= limit,
        f"{setting}={number} is more processes than the {cpus} CPUs of this process can run; lower it to {limit} or less",
    )
