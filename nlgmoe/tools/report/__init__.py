"""`nlgmoe report`: an HTML page about one or several runs.

`runs.py` reads run folders; `figures.py` and `groups.py` draw; `tables.py` writes tables; `page.py` assembles. A report needs
only the files of run folders, no data or checkpoint.
"""

from __future__ import annotations


def report(runs: list[str], output: str | None = None, group_by: str | None = None) -> None:
    """Write an HTML page about one or several runs: losses, speed, routers, experts, settings. It works offline.

    Args:
        runs: run folders, trainer.default_root_dir; files among them are skipped, so that runs/* may be given.
        output: HTML file; default: report.html, in the run folder or, for several runs, in the working directory.
        group_by: setting in which alone the runs of a group differ, such as seed: adds the means of groups, and the differences
            between groups at the end, paired by the setting's value.
    """
    from nlgmoe.tools.report.page import write_report
    from nlgmoe.tools.report.runs import read_runs

    file = write_report(read_runs(runs), output, group_by)
    print(f"report written to {file} ({file.stat().st_size / 1e6:.1f} MB); open it in a browser")
