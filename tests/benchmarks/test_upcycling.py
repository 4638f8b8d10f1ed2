"""The comparison of ways of upcycling at its smallest: a seed's runs, from the first half to the table."""

from pathlib import Path

import pytest

from benchmarks import upcycling
from benchmarks.gate.records import Records
from benchmarks.reproduce.scale import TINY
from benchmarks.training import train
from nlgmoe import load_model
from nlgmoe.layers.moe import moe_layers
from tests.support.in_process import Here


def test_every_arm_starts_from_the_first_half(
    tmp_path: Path, pocket_pile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = Records(tmp_path / "results.json")
    lengths = {arm: {10} for arm in upcycling.ARMS} | {"shards": {10, 8}}
    runs = upcycling.line(1, lengths, TINY, tmp_path, records)
    assert [run.name.split()[0] for run in runs] == [
        *("first-half", "dense-10", "copy-10", "shards-10", "shards-8", "redrawn-10")
    ]
    train([runs], 1, Here(killed=0))
    assert {run["val_loss"] for run in records.runs.values()} and len(records.runs) == 6
    copy, shards, redrawn = (load_model(tmp_path / f"{arm}/seed1.ckpt") for arm in ("copy", "shards", "redrawn"))
    dense = load_model(tmp_path / "first-half/seed1/checkpoints/last.ckpt").blocks[1].ffn
    experts = [moe_layers(model)[0].experts for model in (copy, shards, redrawn)]
    assert [of.up_weight.shape[:1] for of in experts] == [(16,), (64,), (16,)]
    assert all((of.up_weight[0] == dense.up.weight.t()[:, : of.up_weight.shape[2]]).any() for of in experts)
    costs = {"flops": 1.0, "seconds": 1.25}
    records.costs |= dict.fromkeys(("copy", "shards", "redrawn"), costs)
    text = upcycling.table(records, [{"seed": 1, "val_loss": 5.0}], [1], TINY)
    difference = records.runs["shards-8 seed1"]["val_loss"] - records.runs["dense-10 seed1"]["val_loss"]
    row = next(line for line in text.splitlines() if line.startswith("| shards"))
    assert f"{difference:+.4f} nats, 1 pair" in row and row.count("1 pair") == 4
    assert all(run.has_ended for run in upcycling.line(1, lengths, TINY, tmp_path, records))
