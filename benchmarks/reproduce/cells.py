"""What is trained: models, budgets and seeds of each claim of the paper.

A cell is one model at one budget, trained once for each seed. Runs of the whole budget are trunks: a smaller budget goes on from
a checkpoint of the trunk's constant learning rate and cools it down (WSD), so that it costs a fifth of its tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

STEPS = 2400  # of the whole budget, 20 tokens per active parameter
BUDGETS = (0.25, 0.5, 1.0)
COOLDOWN = 0.2  # share of a budget
STAGED = 0.6  # share of a budget that a staged student is distilled on
SEEDS = (1, 2, 3)  # seed 0 is for learning rates alone
SEEDS_EQUAL = tuple(range(1, 9))  # of equivalence tests
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
        """The cell whose checkpoint this one goes on from; None: it starts from nothing."""
        return None if self.budget == 1.0 or self.distilled == "staged" else Cell(self.config, 1.0, self.distilled)


@dataclass(frozen=True)
class Claim:
    """One claim of the paper.

    Attributes:
        number: its number here.
        title: what the paper says, and where.
        paper: what it found, at its size.
        cells: what has to be trained.
        seeds: of each cell.
    """

    number: int
    title: str
    paper: str
    cells: tuple[Cell, ...]
    seeds: tuple[int, ...] = SEEDS


TEACHER = Cell("pr_moe")
GROWTH = ("dense", "moe_4", "moe_16", "moe_32")
WIDER = ("dense", "dense_1.5x", "dense_2x", "dense_2.8x", "dense_4x")
WIDEST = WIDER[-1]
TUNED = ("dense", "moe_8", "moe_32", WIDEST)  # models whose learning rate is searched
RATES = (4e-3, 8e-3, 16e-3)
TUNING_BUDGET = 0.5

CLAIMS = (
    Claim(
        1,
        "More experts give a lower loss at the same cost a token (figure 1)",
        "350M with 128 experts has the validation loss of 1.3B dense",
        tuple(Cell(name, budget) for budget in reversed(BUDGETS) for name in GROWTH),
    ),
    Claim(
        2,
        "A dense model of the same loss costs 5 times as much (section 3.3)",
        "6.7B dense trains 70 sequences/s, 1.3B with 128 experts 372: 5.3 times",
        (*(Cell(name) for name in WIDER), Cell("moe_16")),
    ),
    Claim(
        5,
        "PR-MoE is as good as standard MoE with a third of the parameters (figure 4)",
        "within about 0.01 nats, 4B parameters against 13B",
        (Cell("moe_32"), TEACHER),
        SEEDS_EQUAL,
    ),
    Claim(
        6,
        "Staged distillation beats distillation to the end and none (section 4.2, figures 5 and 6)",
        "21 of 24 blocks; to the end helps early and hurts late; staged has the teacher's loss",
        (TEACHER, *(Cell("student", budget, how) for how in (None, "full", "staged") for budget in reversed(BUDGETS))),
    ),
    Claim(
        3,
        "Experts in the second half beat experts in the first (figure 2, left)",
        "a clearly lower validation loss",
        (Cell("first_half"), Cell("second_half")),
    ),
    Claim(
        4,
        "Residual top-1 is as good as top-2, and faster (figure 2, right)",
        "the same validation loss; more than 10% faster",
        (Cell("top_2"), Cell("residual")),
        SEEDS_EQUAL,
    ),
    Claim(
        8,
        "At equal loss, PR-MoE has 3 and PR-MoE with MoS 3.7 times fewer parameters than standard MoE (section 4.3)",
        "13B, 4B and 3.5B parameters; 52B, 31B and 27B",
        (Cell("moe_32"), TEACHER, Cell("student", 1.0, "staged")),
    ),
    Claim(
        7,
        "Capacity factor 1.0 costs nothing next to dropless (the tutorial's setting)",
        "not compared; all models train with capacity factor 1.0",
        (Cell("capacity"), Cell("moe_16")),
    ),
)  # fmt: skip


def runs_of(claims: tuple[Claim, ...]) -> Iterator[tuple[Cell, int]]:
    """Yield every cell and seed once, each after those that it goes on from."""
    seen = set()
    for claim in claims:
        for seed in claim.seeds:
            for cell in claim.cells:
                needed = [cell.trunk, TEACHER if cell.distilled else None, cell]
                for one in needed:
                    if one is not None and (one, seed) not in seen:
                        seen.add((one, seed))
                        yield one, seed
