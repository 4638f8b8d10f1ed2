"""Up to 512 ranks in one process: groups and placements of all, and steps of some, whose collectives do nothing."""

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import distributed

from nlgmoe import GPTConfig
from nlgmoe.commands.main import main as command
from nlgmoe.parallel.expert_groups import expert_placements, layer_degrees, make_groups
from nlgmoe.pyramid import experts_per_layer
from nlgmoe.tools.planner.simulate import simulated_rank

ROOT = Path(__file__).parents[2]
PAPER = ["moe/125m_moe_64", "moe/1.3b_moe_128", "pr_moe/350m_pr_moe_32_64", "pr_moe/1.3b_pr_moe_64_128"]


@pytest.mark.parametrize("ranks", [64, 128, 512])
def test_experts_are_each_on_the_ranks_of_one_replica_group(ranks: int) -> None:
    files = [yaml.safe_load((ROOT / f"configs/{name}.yaml").read_text()) for name in PAPER]
    models = [GPTConfig.from_dict(file["model"]["config"]) for file in files]
    degrees = [layer_degrees(model, ranks, ranks) for model in models]
    copies: dict[tuple[int, int, int], list[int]] = {}  # (model, block, expert) -> the ranks that hold it
    replicas: dict[tuple[int, int], list[int]] = {}  # (degree, rank) -> its replica group
    for rank in range(ranks):
        with simulated_rank(rank, ranks):
            used = sorted({degree for by_block in degrees for degree in by_block.values()})
            groups = {degree: make_groups(degree, timedelta(seconds=9)) for degree in used}
            for degree, group in groups.items():
                first = rank - rank % degree
                assert distributed.get_process_group_ranks(group.parallel) == list(range(first, first + degree))
                replicas[degree, rank] = distributed.get_process_group_ranks(group.data_parallel)
            for number, (model, by_block) in enumerate(zip(models, degrees, strict=True)):
                for block, place in expert_placements(model, by_block, groups).items():
                    for expert in range(place.first, place.first + place.count):
                        copies.setdefault((number, block, expert), []).append(rank)
    assert len(copies) == sum(sum(experts_per_layer(model)) for model in models)
    for (number, block, _), holders in copies.items():
        assert all(replicas[degrees[number][block], rank] == holders for rank in holders)


def reduced(**data: Any) -> dict[str, Any]:
    """The layout of 1.3B+PR-MoE-64/128 with two of its MoE layers, at a sixteenth of its width."""
    moe = {"num_experts": [64, 128], "mlp_type": "residual"}
    model = {"vocab_size": 8000, "seq_len": 256, "num_layers": 4, "hidden_size": 128, "num_heads": 2, "moe": moe}
    model |= {"hidden_dropout": 0.1, "attention_dropout": 0.1}
    strategy = {"class_path": "nlgmoe.ExpertParallelStrategy", "init_args": {"stage": 1, "expert_parallel_size": 128}}
    trainer = {"accelerator": "gpu", "num_nodes": 64, "devices": 8, "precision": "bf16-mixed", "strategy": strategy}
    return {"model": {"config": model}, "trainer": trainer, "data": {"micro_batch_size": 2, "seq_len": 256} | data}


@pytest.mark.parametrize(
    ("ranks", "rank", "options", "muon"),
    [(64, 5, ["--zero=2", "--global-batch=256", "--activation-checkpointing"], {}), (512, 300, [], None)],
)
def test_simulated_step_sends_what_is_predicted(
    ranks: int,
    rank: int,
    options: list[str],
    muon: dict[str, Any] | None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = reduced()
    run["model"]["optimizer"] = {"muon": muon}
    (file := tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    where = [f"--gpus={ranks}", f"--rank={rank}", "--simulate", "--json"]
    command(["inspect", str(file), *where, *options])
    report = json.loads(capsys.readouterr().out)
    predicted, simulated = report["predicted"], report["simulated"]
    for kind, sent in predicted["bytes"].items():
        assert simulated["bytes"][kind] == pytest.approx(sent, rel=1e-3), kind
        assert sent > 0 or kind == {64: "expert_gradients", 512: "muon_matrices"}[ranks]
    assert 1 <= predicted["peak_bytes"] / simulated["peak_bytes"] < 1.15


def test_simulation_refuses_what_training_refuses_in_the_same_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (file := tmp_path / "run.yaml").write_text(yaml.safe_dump(reduced(global_batch_size=1000)))
    with pytest.raises(SystemExit):
        command(["inspect", str(file), "--simulate"])
    line = "data.global_batch_size=1000 is not a multiple of the 1024 sequences that 512 ranks feed at a time"
    assert line in capsys.readouterr().err
