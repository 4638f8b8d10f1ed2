"""The length of sequences against DeepSpeed's `fixed_linear` schedule, a step of which is a token here."""

import pytest
from deepspeed.runtime.data_pipeline.curriculum_scheduler import CurriculumScheduler

from nlgmoe.optim.token_schedule import SequenceCurriculum, sequence_length


@pytest.mark.parametrize(
    ("start", "whole", "increment", "duration"), [(80, 2048, 8, 4096), (8, 64, 8, 32), (24, 24, 8, 8)]
)
def test_lengths_are_deepspeeds(start: int, whole: int, increment: int, duration: int) -> None:
    """A duration that is a power of two: DeepSpeed divides in floating point."""
    settings = {"curriculum_type": "seqlen", "min_difficulty": start, "max_difficulty": whole}
    schedule = {"total_curriculum_step": duration, "difficulty_step": increment}
    theirs = CurriculumScheduler(settings | {"schedule_type": "fixed_linear", "schedule_config": schedule})
    ours = SequenceCurriculum(duration, start, increment)
    for now in range(duration + 10):
        assert sequence_length(now, whole, ours) == theirs.get_difficulty(now)
