"""Limit the number of processes that a setting may start: far too many make the machine hang without an error."""

from __future__ import annotations

import os

from nlgmoe.validation import require


def usable_cpus() -> int:
    """Return the number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_processes(setting: str, number: int) -> None:
    """Check a number of processes to start.

    Raises:
        ValueError: it is above 64 and above 8 per CPU that this process may use.
    """
    cpus = usable_cpus()
    limit = max(64, 8 * cpus)
    require(
        number <= limit,
        f"{setting}={number} is more processes than the {cpus} CPUs of this process can run; lower it to {limit} or less",
    )
