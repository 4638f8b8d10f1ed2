"""How many processes a machine can take: a number that is far too high hangs it before anything is said."""

from __future__ import annotations

import os

PER_CPU = 8
AT_LEAST = 64


def usable_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_processes(setting: str, number: int) -> None:
    """Check a number of processes to start.

    Raises:
        ValueError: it is above 8 for each CPU that this process may use, and above 64.
    """
    cpus = usable_cpus()
    limit = max(AT_LEAST, PER_CPU * cpus)
    if number > limit:
        raise ValueError(
            f"{setting}={number} is more processes than the {cpus} CPUs that this process may use can serve; lower it to "
            f"{limit} or less"
        )
