"""`nlgmoe report`: one page about runs."""

from __future__ import annotations

from nlgmoe.cli.errors import UsageError
from nlgmoe.tools.report.runs import read_runs


def report(runs: list[str], output: str | None = None) -> None:
    """Write a page about one run or several: losses, speed, what the routers and experts do, settings; opens without a network.

    Args:
        runs: their folders, trainer.default_root_dir.
        output: the file; by default report.html, in the run's folder, or of several runs in the working directory.

    Raises:
        ValueError: one of them is no run folder.
    """
    from nlgmoe.tools.report.page import write_report  # plotly

    try:
        found = read_runs(runs)
    except ValueError as error:
        raise UsageError(str(error)) from error
    file = write_report(found, output)
    print(f"report written to {file} ({file.stat().st_size / 1e6:.1f} MB); open it in a browser")
