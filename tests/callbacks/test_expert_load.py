"""Routing statistics, compared with numbers worked out by hand or from the routings, and the steps at which they are read."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from nlgmoe.callbacks import ExpertLoad
from nlgmoe.callbacks.expert_load import has_row
from nlgmoe.callbacks.routing_statistics import WITH_TOTAL, routing_statistics, routing_totals
from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.layers.router import TopKRouter
from nlgmoe.layers.routing import Routing
from nlgmoe.module import MoEGPTModule
from nlgmoe.non_finite import NonFinite
from tests.support.commands import rows_of
from tests.support.non_finite import Spoils, output_of
from tests.support.synthetic import SyntheticData
from tests.support.trainers import CONFIG, Logged, SaveAt, trainer


def test_expert_load_statistics_by_hand() -> None:
    """Two tokens and one padding token choose the first of four experts, which has capacity for one."""
    probs = torch.tensor([[0.97, 0.01, 0.01, 0.01], [0.25, 0.25, 0.25, 0.25], [0.1, 0.2, 0.3, 0.4]])
    routing = Routing(
        expert=torch.tensor([[0], [0], [3]]),
        weight=torch.tensor([[0.97], [0.0], [0.0]]),
        kept=torch.tensor([[True], [False], [False]]),
        num_experts=4,
        logits=3 * probs.log(),  # of a router whose distribution is not their softmax
        probs=probs,
        token_mask=torch.tensor([True, True, False]),
        expert_share=torch.tensor([0.25, 0.75, 0.9]),
    )
    entropy = -0.97 * math.log(0.97) - 0.03 * math.log(0.01) + math.log(4)
    squares = 9 * (math.log(0.97) ** 2 + 3 * math.log(0.01) ** 2 + 4 * math.log(0.25) ** 2)
    sums = routing_totals(routing).tolist()
    expected = {"load_max_over_mean": 4.0, "load_min_over_mean": 0.0}
    expected |= {"load_cv": math.sqrt(3), "dropped": 0.5, "entropy": entropy / 2 / math.log(4), "expert_share": 0.5}
    expected |= {"confidence": (0.97 + 0.25) / 2, "logit_rms": math.sqrt(squares / 8)}
    assert routing_statistics(sums) == pytest.approx(expected, rel=1e-5)
    without = routing_totals(replace(routing, probs=None, logits=None, expert_share=None)).tolist()
    lacking = {"entropy", "confidence", "logit_rms", "expert_share"}
    assert expected.keys() - routing_statistics(without).keys() == lacking
    none = routing_statistics([0.0] * (4 + 1 + len(WITH_TOTAL)))
    assert all(map(math.isnan, none.values()))  # an interval of skipped steps: nothing was dropped, nothing balanced


class Routings(Logged):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[list[Routing]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.seen.append(pl_module.routings)
        super().on_train_batch_end(trainer, pl_module)


def fit(folder: Path, *callbacks: Callback, module: Any = None, checkpoint: Any = None, **settings: Any) -> Routings:
    seen = Routings()
    run = trainer(folder, *callbacks, seen, **settings)
    run.fit(module or MoEGPTModule(CONFIG), SyntheticData(), ckpt_path=checkpoint)
    return seen


def test_expert_load_covers_all_micro_batches_of_an_interval(tmp_path: Path) -> None:
    seen = Routings()
    run = trainer(tmp_path, ExpertLoad(), seen, max_steps=4, log_every_n_steps=2, accumulate_grad_batches=2)
    run.fit(MoEGPTModule(CONFIG), SyntheticData(padded=True))
    rows = rows_of(tmp_path / "expert_load.csv")
    assert [(row["step"], row["tokens"], row["moe_layer"]) for row in rows] == [
        (step, tokens, layer) for step, tokens in (("1", "256"), ("3", "512")) for layer in "01"
    ]
    for interval, logged in enumerate([seen.logged[1], seen.logged[3]]):
        for layer in (0, 1):
            routings = [batch[layer] for batch in seen.seen[4 * interval : 4 * interval + 4]]
            chosen = torch.cat([routing.expert[routing.token_mask] for routing in routings])
            load = torch.bincount(chosen.flatten(), minlength=routings[0].num_experts)
            row = rows[2 * interval + layer]
            assert [row[f"expert_{e}"] for e in range(4)] == [*map(str, load.tolist()), *[""] * (4 - len(load))]
            found = {name.rpartition("/")[2]: logged[name] for name in logged if name.startswith(f"experts/{layer}/")}
            assert found["load_cv"] == pytest.approx(float(load.double().std(correction=0) / load.double().mean()))
            kept = sum(int(routing.kept.sum()) for routing in routings)
            assert found["dropped"] == pytest.approx(1 - kept / len(chosen), abs=1e-6)


@pytest.mark.parametrize(("steps", "tokens"), [(2, None), (3, None), (-1, 3 * 64)], ids=["logged", "steps", "tokens"])
def test_gradient_norms_of_parts_make_the_whole(steps: int, tokens: int | None, tmp_path: Path) -> None:
    """In the row of a run's last step too, which may be between two logging intervals."""
    module = MoEGPTModule(CONFIG, train_tokens=tokens)
    seen = fit(tmp_path, ExpertLoad(), module=module, max_steps=steps, log_every_n_steps=2, gradient_clip_val=0.1)
    parts = [value for name, value in seen.logged[-1].items() if "/grad_norm_" in name]
    assert len(parts) == 5 and min(parts) > 0
    assert math.hypot(*parts) == pytest.approx(seen.logged[-1]["train/grad_norm"], rel=1e-5)


def test_expert_load_does_not_count_a_skipped_step(tmp_path: Path) -> None:
    module = MoEGPTModule(CONFIG, non_finite=NonFinite("skip"))
    breaks = Spoils({1}, output_of("blocks.0.ffn_norm", lambda out: out * torch.nan))
    with pytest.warns(UserWarning, match="skipped"):
        seen = fit(tmp_path, breaks, ExpertLoad(), module=module, max_steps=4, log_every_n_steps=2)
    first, second = seen.logged[1], seen.logged[3]
    assert math.isfinite(first["experts/0/entropy"]) and math.isnan(first["experts/0/grad_norm_router"])
    assert all(math.isfinite(value) for name, value in second.items() if name.startswith("experts/"))
    asked = [sum(int(row[f"expert_{e}"] or 0) for e in range(4)) for row in rows_of(tmp_path / "expert_load.csv")]
    assert asked == [64, 64, 128, 128]


def test_dead_experts_had_no_token_in_a_window_also_over_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def first(self: TopKRouter, logits: Tensor, *_: Any) -> Tensor:
        return torch.zeros(len(logits), 1, dtype=torch.long)

    monkeypatch.setattr(TopKRouter, "_choose", first)
    saved, often = tmp_path / "two.ckpt", {"max_steps": 4, "log_every_n_steps": 1}
    whole = fit(tmp_path, ExpertLoad(dead_window=3), SaveAt(2, saved), **often)
    rest = fit(tmp_path, ExpertLoad(dead_window=3), checkpoint=saved, **often)
    assert [[logged["experts/1/dead"] for logged in seen.logged] for seen in (whole, rest)] == [[0, 0, 3, 3], [3, 3]]


def test_expert_load_goes_on_with_the_interval_after_a_resume(tmp_path: Path) -> None:
    def load(*savers: Callback, checkpoint: Path | None = None) -> tuple[dict[str, float], str]:
        seen = fit(tmp_path, ExpertLoad(), *savers, checkpoint=checkpoint, max_steps=8, log_every_n_steps=4)
        logged = seen.logged[-1]
        values = {name: value for name, value in logged.items() if name.startswith("experts/")}
        return values, (tmp_path / "expert_load.csv").read_text()

    saved = tmp_path / "checkpoints/step-5.ckpt"
    whole = load(SaveAt(5, saved))
    assert load(checkpoint=saved) == whole
    elsewhere = saved.rename(tmp_path / "elsewhere.ckpt")  # as of another run's folder
    (header, *rows), later = whole[1].splitlines(), load(checkpoint=elsewhere)[1].splitlines()
    assert later == [header, *(row for row in rows if row.startswith("7,"))]


def test_expert_load_rows_thin_out_by_the_step_alone() -> None:
    assert [interval for interval in range(1, 1100) if has_row(interval)] == [
        *range(1, 257), *range(258, 513, 2), *range(516, 1025, 4), *range(1032, 1100, 8)
    ]  # fmt: skip


def test_expert_load_rows_that_thin_out_are_those_of_their_interval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a run is killed and resumed between rows, and in a fork; rows are counted without reading the file."""

    def rows(folder: str, *callbacks: Callback, checkpoint: Path | None = None) -> list[dict[str, str]]:
        fit(tmp_path / folder, ExpertLoad(), *callbacks, checkpoint=checkpoint, max_steps=12, log_every_n_steps=1)
        return rows_of(tmp_path / folder / "expert_load.csv")

    every = rows("every")
    monkeypatch.setattr("nlgmoe.callbacks.expert_load.ROWS_PER_DOUBLING", 2)
    saved = tmp_path / "thin/checkpoints/step-7.ckpt"
    thin = rows("thin", SaveAt(7, saved))
    assert thin == [row for row in every if int(row["step"]) in (0, 1, 2, 3, 5, 7, 11)]
    states = json.loads((saved / "checkpoint.json").read_text())["callbacks"]
    assert [state["rows"] for name, state in states.items() if name.startswith("ExpertLoad")] == [10]
    assert rows("thin", checkpoint=saved) == thin
    assert rows("fork", checkpoint=saved) == thin[-4:]


def test_expert_load_in_validate_is_the_checkpoints(tmp_path: Path) -> None:
    """Over all of its text; padding counts in nothing."""
    module = MoEGPTModule(GPTConfig(61, 16, 4, 16, 2, init_std=0.3, moe=MoEConfig([2, 4], top_k=2)))
    data = SyntheticData(padded=True)
    run = trainer(tmp_path, ExpertLoad(), limit_val_batches=1.0)
    (logged,) = run.validate(module, data, verbose=False)
    loads = torch.zeros(2, 4)
    with torch.no_grad():
        for batch in data.val_dataloader():
            for layer, routing in enumerate(module.gpt.eval()(batch["tokens"], batch["token_mask"]).routings):
                loads[layer, : routing.num_experts] += routing.tokens_per_expert
    for layer, experts in enumerate((2, 4)):
        load = loads[layer, :experts]
        assert logged[f"experts/{layer}/load_max_over_mean"] == pytest.approx(float(load.max() / load.mean()))
        assert logged[f"experts/{layer}/dropped"] == 0 and 0 < logged[f"experts/{layer}/entropy"] < 1
    assert not any(name.startswith("experts/") for name in run.test(module, data, verbose=False)[0])
