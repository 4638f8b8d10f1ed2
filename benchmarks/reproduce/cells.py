"""Models and budgets.

A cell is one model at one budget, trained once for each seed. Runs of the whole budget are trunks: a smaller budget resumes
a checkpoint of the trunk's constant learning rate and decays it (WSD), so that it trains on a fifth of its tokens only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

STEPS = 2400  # of the whole budget, 20 tokens per active parameter
STEP_TOKENS = 16 * 128
BUDGETS = (0.25, 0.5, 1.0)
COOLDOWN = 0.2  # share of a budget
STAGED = 0.6  # share of a budget that a staged student is distilled on
SEEDS = (1, 2, 3)  # seed 0 is for learning rates alone
MARGIN = 0.02  # nats: "as good as"


@dataclass(frozen=True)
class Cell:
    """One model at one budget.

    Attributes:
        config: file of configs/reproduce.
        budget: share of the whole budget.
        distilled: from recorded logits of the teacher of the same seed: to the end (`full`), or for the first part (`staged`).
    """

    config: str
    budget: float = 1.0
    distilled: Literal["full", "staged"] | None = None

    @property
    def name(self) -> str:
        """Name in results and folders."""
        return self.config + (f"-{self.distilled}" if self.distilled else "") + f"@{self.budget:g}"

    @property
    def trunk(self) -> Cell | None:
        """The cell whose checkpoint this one resumes; None: it starts from random weights."""
        return None if self.budget >= 1.0 or self.distilled == "staged" else Cell(self.config, 1.0, self.distilled)


TEACHER = Cell("pr_moe")
GROWTH = ("dense", "moe_4", "moe_16", "moe_32")
WIDER = ("dense", "dense_1.5x", "dense_2x", "dense_2.8x", "dense_4x")
WIDEST = WIDER[-1]
TUNED = ("dense", "moe_8", "moe_32", WIDEST)  # models whose learning rate is searched
RATES = (4e-3, 8e-3, 16e-3)
TUNING_BUDGET = 0.5
LOWER_RATE = 2e-3  # of the widest model, whose best rate is near the edge of `RATES`; no run uses it
CONTROL = Cell("student", 2.0)  # its tokens equal those of the student and of its teacher together

# What the page's tables have beside the questions, with `SEEDS`
TABLES = (
    *(Cell(name, budget) for budget in reversed(BUDGETS) for name in GROWTH),
    *(Cell(name) for name in WIDER),
    *(Cell("student", budget, how) for how in (None, "full", "staged") for budget in reversed(BUDGETS)),
    CONTROL,
)
