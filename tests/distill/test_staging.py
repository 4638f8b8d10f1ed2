"""When distillation ends, by hand."""

import pytest

from nlgmoe.callbacks import StagedDistillation
from nlgmoe.optim.token_schedule import distillation_weight


def test_the_weight_by_the_clock() -> None:
    assert [distillation_weight(clock, 100) for clock in (0, 99, 100, 101)] == [1, 1, 0, 0]
    assert [distillation_weight(clock, 100, 40) for clock in (0, 60, 70, 90, 99, 100)] == [1, 1, 0.75, 0.25, 0.025, 0]
    assert distillation_weight(0, 100, 100) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"step": 1, "tokens": 1}, "step=1, tokens=1, fraction=None; give one of them"),
        ({"fraction": 1.5}, "fraction=1.5 must be at most 1"),
        ({"tokens": 5, "ramp_tokens": 6}, "ramp_tokens=6 is above tokens=5"),
    ],
)
def test_ends_that_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        StagedDistillation(**settings)  # type: ignore[arg-type]
