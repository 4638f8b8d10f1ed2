"""The planted faults still fit the package; `make planted` plants them."""

from collections import Counter

from tests.planted.__main__ import ROOT, read_faults


def test_faults_can_all_be_planted_and_every_area_has_two() -> None:
    faults = read_faults("")
    assert {fault.fault: fault.problem() for fault in faults if fault.problem()} == {}
    assert len(faults) >= 30 and min(Counter(fault.area for fault in faults).values()) >= 2
    for fault in faults:
        file, _, name = fault.test.partition("::")
        assert not name or f"def {name.partition('[')[0]}(" in (ROOT / file).read_text(), fault.test
