"""The questions that the small models answer, and the rules by which their results are read.

The rules were fixed before the runs that they judge (the commit that added this file); nothing here depends on results.

1. A question compares two models in pairs: one pair for each seed, which fixes the order of the data and the initial dense
   weights of both. It has no reading before all its planned pairs are trained.
2. `lower`: a two-sided paired t test of no difference in validation loss.
3. `not worse` ("as good as"): two one-sided paired t tests of a difference of `MARGIN` nats, below it (as good; a better first
   model is as good) and above it (worse). The smaller p counts as it is, not doubled.
4. Several questions are asked of one campaign: a p value counts only if Holm's correction over all of `QUESTIONS` leaves it below
   5%. Intervals are printed without that correction. `LARGER`, two of these questions at a larger size, has its own correction.
5. Readings: `agrees` (with the paper), `differs here` (the opposite is significant), `unresolved`, `cannot be tested here`.
6. What no paired test of losses can answer has its own rule, in `OTHERS`.

Pairs that were seen before these rules:

- `residual`: the eight pairs against `top_2`, whose second expert is sampled in training, were read as two-sided equivalence. The
  page shows that reading; the eight new pairs against `top_2_argmax` decide.
- `pr_moe`: all eight pairs. The rule was equivalence within the same margin; it is one-sided now. Both readings are shown.
- `taught`: all three pairs, with the same rule.
- `experts`, `half`, `everywhere`, `staged`, `capacity`: three of the eight (`capacity`: sixteen) pairs. The rule of the last was
  equivalence. Three pairs cannot pass the correction for eight questions unless t is above 15, so the first two have eight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from scipy import stats

from benchmarks.reproduce.cells import MARGIN, SEEDS, TABLES, TEACHER, Cell
from nlgmoe.tools.report.groups import PairedDifference

LEVEL = 0.05  # of a test, and of all of them together
AGREES, DIFFERS, UNRESOLVED, UNTESTABLE = "agrees", "differs here", "unresolved", "cannot be tested here"


@dataclass(frozen=True)
class Question:
    """A difference between two models.

    Attributes:
        key: its name on the command line.
        title: the question, in a few words.
        paper: what the paper says, and where.
        rule: `lower` or `not worse`: what `first` is next to `second`, if the paper is right.
        first: the model that the paper favours.
        second: the model beside it.
        pairs: seeds 1 to `pairs` are trained.
    """

    key: str
    title: str
    paper: str
    rule: Literal["lower", "not worse"]
    first: Cell
    second: Cell
    pairs: int


STAGED_STUDENT = Cell("student", 1.0, "staged")

QUESTIONS = (
    Question(
        "experts", "16 experts have a lower loss than a dense model of the same FLOPs a token",
        "350M with 128 experts has the validation loss of 1.3B dense (figure 1)", "lower", Cell("moe_16"), Cell("dense"), 8,
    ),
    Question(
        "half", "Experts in the second half beat experts in the first",
        "a clearly lower validation loss (figure 2, left)", "lower", Cell("second_half"), Cell("first_half"), 8,
    ),
    Question(
        "everywhere", "Experts in the second half are as good as experts everywhere",
        "not compared; it is what the pyramid builds on", "not worse", Cell("second_half"), Cell("moe_16"), 8,
    ),
    Question(
        "residual", "Residual top-1 is as good as top-2",
        "the same validation loss (figure 2, right)", "not worse", Cell("residual"), Cell("top_2_argmax"), 8,
    ),
    Question(
        "pr_moe", "PR-MoE is as good as standard MoE",
        "within about 0.01 nats with a third of the parameters (figure 4)", "not worse", TEACHER, Cell("moe_32"), 8,
    ),
    Question(
        "taught", "A student taught in stages beats one without a teacher",
        "21 of 24 blocks; staged has the teacher's loss (section 4.2, figure 6)", "lower", STAGED_STUDENT, Cell("student"), 3,
    ),
    Question(
        "staged", "Distillation in stages beats distillation to the end",
        "to the end helps early and hurts late (section 4.2, figure 5)", "lower", STAGED_STUDENT, Cell("student", 1.0, "full"), 8,
    ),
    Question(
        "capacity", "Capacity factor 1.0 is as good as dropless",
        "not compared; all its models train with capacity factor 1.0", "not worse", Cell("capacity"), Cell("moe_16"), 16,
    ),
)  # fmt: skip

# Does it grow? No run of these models was seen before the rule.
LARGER = (
    replace(QUESTIONS[0], key="experts_2x", title="16 experts against dense, twice the active parameters and tokens",
            first=Cell("moe_16_2x", 2.0), second=Cell("dense_2x", 2.0)),
    replace(QUESTIONS[2], key="everywhere_2x", title="Second half against everywhere, twice the active parameters and tokens",
            first=Cell("second_half_2x", 2.0), second=Cell("moe_16_2x", 2.0)),
)  # fmt: skip
SIZES = (QUESTIONS[0], LARGER[0], QUESTIONS[2], LARGER[1])

OTHERS = {
    "cheaper": (
        "Cannot be tested here: 16 experts and 32 channels, where the paper has 128 and 2,048. The FLOPs and seconds of an "
        "equally good dense model, relative to MoE-16's, are printed with a t interval of the logarithm over seeds."
    ),
    "faster": "Agrees if a step of residual top-1 takes at most 0.9 of the time of top-2's (medians of interleaved steps).",
    "control": "The student alone on twice the tokens is printed beside the staged student, with the interval; not judged.",
    "sizes": "The parameters of each model are printed beside its loss; not judged.",
}


def p_values(question: Question, difference: PairedDifference) -> tuple[float, float]:
    """Return the p values of the paper's answer and of its opposite: small values are evidence for that answer.

    Those of `lower` are two-sided, those of `not worse` one-sided each.
    """
    shift = MARGIN if question.rule == "not worse" else 0.0
    t = (difference.mean - shift) / difference.error
    below = float(stats.t.cdf(t, difference.pairs - 1))
    sides = 2 if question.rule == "lower" else 1
    return min(1.0, sides * below), min(1.0, sides * (1 - below))


def readings(differences: Sequence[tuple[Question, PairedDifference | None]]) -> dict[str, str]:
    """Read all questions together, by key; those whose pairs are not all trained are left out, and count in the correction."""
    tests = []
    for question, difference in differences:
        if difference is not None and difference.pairs >= question.pairs:
            for answer, p in zip((AGREES, DIFFERS), p_values(question, difference), strict=True):
                tests.append((p, question.key, answer))
    answers = {key: UNRESOLVED for _, key, _ in tests}
    # Of the two answers of a question the one with the smaller p.
    smallest = sorted(min(test for test in tests if test[1] == key) for key in answers)
    for rank, (p, key, answer) in enumerate(smallest):  # Holm: the first that is not small enough ends it
        if p * (len(differences) - rank) >= LEVEL:
            break
        answers[key] = answer
    return answers


def runs_of(questions: Sequence[Question], tables: bool = True) -> list[tuple[Cell, int]]:
    """Return every cell and seed that is needed once, each after those that it goes on from.

    Args:
        questions: whose pairs are trained.
        tables: train the other cells of the page's tables too.
    """
    wanted = [
        (cell, seed)
        for seed in range(1, max((question.pairs for question in questions), default=0) + 1)
        for question in questions
        if seed <= question.pairs
        for cell in (question.first, question.second)
    ]
    wanted += [(cell, seed) for seed in SEEDS for cell in TABLES] if tables else []
    runs: dict[tuple[Cell, int], None] = {}
    for cell, seed in wanted:
        for needed in (cell.trunk, TEACHER if cell.distilled else None, cell):
            if needed is not None:
                runs[needed, seed] = None
    return list(runs)
