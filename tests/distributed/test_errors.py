"""Errors of some ranks are raised by all."""

from pathlib import Path

from torch import distributed

from nlgmoe.ranks import raise_on_all_ranks
from nlgmoe.validation import RunError, SettingError
from tests.support.spawn import spawn


def test_a_wrong_setting_on_one_rank_is_a_setting_error_on_all(tmp_path: Path) -> None:
    """Its exit code is 2; that of an error of a run, 1."""
    expected = [("rank 1: seed=-1", True), ("rank 1: disk full", False)]
    assert spawn(2, errors_of_ranks, folder=tmp_path) == [expected, expected]


def errors_of_ranks() -> list[tuple[str, bool]]:
    distributed.init_process_group("gloo")
    errors = []
    for error in (SettingError("seed=-1"), RunError("disk full")):
        try:
            with raise_on_all_ranks():
                if distributed.get_rank() == 1:
                    raise error
        except RunError as raised:
            errors.append((str(raised), isinstance(raised, SettingError)))
    distributed.destroy_process_group()
    return errors
