"""`nlgmoe experts` on a small model and a run: its files agree with each other, and its mistakes are one line."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from nlgmoe import GPTConfig, HashRouterConfig, MoEConfig, load_pretrained
from nlgmoe.callbacks.routing_windows import RoutingWindows, recorded
from nlgmoe.checkpoint.reading import Checkpoint
from nlgmoe.checkpoint.verify import hash_of_weights
from nlgmoe.cli.train import main as train
from nlgmoe.commands.main import main
from nlgmoe.eval.causes import Changes
from nlgmoe.eval.trace import Trace
from nlgmoe.module import MoEGPTModule
from nlgmoe.tools.report.runs import read_runs
from tests.report.browser import look
from tests.support.checkpoints import TOKENIZER, write
from tests.support.commands import error_of, quickstart
from tests.support.synthetic import SyntheticData
from tests.support.trainers import trainer

TEXT = "the king and the queen. <!-- </script> <script> " * 40
CONFIG = GPTConfig(TOKENIZER.vocab_size, 24, 4, 32, 2, moe=MoEConfig([3, 4], top_k=2, token_dropping=False))
CARDS = """
const choose = (id, value) => { document.getElementById(id).value = value; document.getElementById(id).onchange(); };
const before = document.querySelectorAll(".card").length;
choose("layer", "1");
const after = document.querySelectorAll(".card").length;
document.querySelector("#text span").onclick();
return [before, after, document.querySelectorAll(".card").length, document.querySelector(".card").innerText];
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    write(folder / "small.ckpt", CONFIG, tokenizer=TOKENIZER.files)
    (folder / "text.txt").write_text(TEXT)
    main(["experts", str(folder / "small.ckpt"), f"--text={folder / 'text.txt'}", "--exact=1:0,2", "--weights"])
    return folder


def tables(folder: Path) -> dict[str, pd.DataFrame]:
    names = ("experts", "analyses", "coactivation", "vocabulary")
    return {name: pd.read_csv(folder / f"{name}.csv") for name in names}


def test_files_agree_with_each_other(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, trace = tables(folder / "small-experts-text"), Trace(folder / "small-experts-text" / "routing.safetensors")
    assert trace.num_tokens == len(TOKENIZER.encode(TEXT))
    assert trace.facts.weights_hash == hash_of_weights(Checkpoint(folder / "small.ckpt"))
    np.testing.assert_allclose(trace.read("weights").sum(axis=2), 1, rtol=1e-5)
    for layer, count in enumerate((3, 4)):
        rows = found["experts"][found["experts"]["layer"] == layer]
        use = np.bincount(trace.experts_of(layer).ravel(), minlength=count) / trace.num_tokens
        np.testing.assert_allclose(rows["use"], use)
        np.testing.assert_allclose(rows["use/text.txt"], use)
    exact = found["experts"].set_index(["layer", "expert"])["contribution"].dropna()
    assert list(exact.index) == [(1, 0), (1, 2)]
    model = load_pretrained(folder / "small.ckpt", without=["1:2"], removal="contribution").model
    ids = torch.tensor([[TOKENIZER.eod_id, *TOKENIZER.encode(TEXT)]])
    changes = [_loss(of, ids) for of in (model, load_pretrained(folder / "small.ckpt").model)]
    assert changes[0] - changes[1] == pytest.approx(float(exact[1, 2]), abs=1e-5)


def _loss(model: Any, ids: torch.Tensor) -> float:
    """The mean loss in windows of 24 tokens, as the command cuts them; the last one is shorter."""
    total, length = 0.0, model.config.seq_len
    with torch.no_grad():
        for start in range(0, ids.shape[1] - 1, length):
            window = ids[:, start : start + length + 1]
            logits = model.logits(model(window[:, :-1]).hidden)
            total += float(torch.nn.functional.cross_entropy(logits[0], window[0, 1:], reduction="sum"))
    return total / (ids.shape[1] - 1)


def test_page_shows_a_card_for_each_expert(folder: Path, tmp_path: Path) -> None:
    first, second, chosen, text = look(folder / "small-experts-text" / "experts.html", CARDS, tmp_path)
    assert (first, second, chosen) == (3, 4, 1)
    assert text.startswith("Expert ") and "to first order" in text


def test_a_study_without_experts_has_the_loss_that_their_removal_adds(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = []
    for more in ([], ["--without=1:2", "--removal=contribution"]):
        main(["experts", str(folder / "small.ckpt"), f"--text={folder / 'text.txt'}", f"--output={tmp_path}", *more])
        losses.append(float(re.findall(r"^loss ([\d.]+)", capsys.readouterr().out, re.MULTILINE)[0]))
    exact = tables(folder / "small-experts-text")["experts"].set_index(["layer", "expert"])["contribution"]
    assert losses[1] - losses[0] == pytest.approx(float(exact[1, 2]), abs=2e-4)


def test_generation_and_loading_without_experts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = str(folder / "small.ckpt")
    texts = []
    for more in ([], ["--without=0:1", "--without=1:0,3"], ["--experts-per-token=1"]):
        main(["generate", checkpoint, "--prompt=the king", "--temperature=0", "--max-new-tokens=15", *more])
        texts.append(capsys.readouterr().out)
    assert len(set(texts)) == 3
    assert load_pretrained(checkpoint, experts_per_token=1).model.config.moe.top_k == 1


def test_mistakes_are_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small, text = folder / "small.ckpt", f"--text={folder / 'text.txt'}"
    dense = write(tmp_path / "dense.ckpt", GPTConfig(TOKENIZER.vocab_size, 24, 2, 32, 2), tokenizer=TOKENIZER.files)
    for words, message in (
        (["experts", small, text, "--exact=0:3"], "exact=0:3: MoE layer 0 has no expert 3; it has 3"),
        (
            ["experts", small, text, f"--against={small}"],
            f"against={small} is the checkpoint itself; give an earlier one",
        ),
        (["experts", small], "give --text FILE"),
        (["experts", dense, text], "has no experts: it is a dense model"),
        (["generate", small, "--prompt=a", "--without=0:0,1"], "1 of 3 experts are left .* remove fewer"),
        (["generate", dense, "--prompt=a", "--experts-per-token=2"], "the model has no experts"),
        (["generate", small, "--prompt=a", "--experts-per-token=9"], "top_k=9"),
    ):
        with_output = [*words, f"--output={tmp_path / 'out'}"] if words[0] == "experts" else words
        assert re.search(message, line := error_of(capsys, *with_output)), line


def test_a_run_is_compared_with_an_earlier_checkpoint(
    tmp_path: Path, pocket_pile: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train(["fit", *quickstart(run, "--trainer.max_steps=8", f"--data.data_dir={pocket_pile}")])
    earlier, layer = run / "checkpoints" / "step-4.ckpt", "experts/0/saturation"
    main(["experts", str(run), "--windows=2", f"--against={earlier}"])
    analyses = pd.read_csv(run / "experts" / "analyses.csv").set_index("analysis")
    assert 0 < analyses.loc["saturation", "value"] < 1
    assert analyses.loc["saturation", "uniform"] == 0.25
    saturated = read_runs([run])[0].metrics[layer]
    assert saturated.index.tolist() == [4, 8]
    assert 0 < saturated.iloc[0] < saturated.iloc[1] == 1
    other = write(tmp_path / "other.ckpt", CONFIG, tokenizer=TOKENIZER.files)
    assert "another tokenizer" in error_of(
        capsys, "experts", other, f"--text={run / 'config.yaml'}", f"--against={run}"
    )


def test_windows_of_every_validation_are_kept(tmp_path: Path) -> None:
    config = GPTConfig(61, 16, 4, 16, 2, moe=MoEConfig([2, 4], top_k=2))
    module, text = MoEGPTModule(config), SyntheticData(padded=True)
    validation = {"val_check_interval": 2, "check_val_every_n_epoch": None, "limit_val_batches": 1.0}
    trainer(tmp_path, RoutingWindows(), max_steps=6, **validation).fit(module, text)
    traces = recorded(tmp_path)
    assert list(traces) == [2, 4, 6]
    last = Trace(traces[6])
    batches = list(text.val_dataloader())
    assert last.num_tokens == sum(int(batch["token_mask"].sum()) for batch in batches)
    with torch.no_grad():
        module.gpt.eval()
        routing = module.gpt(batches[0]["tokens"], batches[0]["token_mask"]).routings[0]
    first = routing.expert[batches[0]["token_mask"].flatten()].numpy()
    assert np.array_equal(last.experts_of(0)[: len(first)], first)
    few = trainer(tmp_path / "few", RoutingWindows(20), max_steps=2, **validation)
    few.fit(MoEGPTModule(config), SyntheticData(padded=True))
    counts = np.bincount(Trace(recorded(tmp_path / "few")[2]).read("domain"))
    assert len(counts) == 2 and all(20 <= count < 20 + 16 for count in counts)  # of each domain, in whole windows


def test_intervals_of_a_mean_by_hand() -> None:
    changes = Changes(np.array([[2.0], [6.0], [4.0]]), np.array([10, 20, 10]), np.array([0, 0, 1]))
    assert changes.mean()[0] == pytest.approx(12 / 40)
    residual = np.array([2 - 3, 6 - 6, 4 - 3])
    half = 4.302653 * np.sqrt(3 / 2 * (residual**2).sum()) / 40  # t of 2 degrees of freedom
    assert changes.half_width()[0] == pytest.approx(half, rel=1e-6)
    assert changes.mean(changes.domain == 1)[0] == pytest.approx(0.4)
    assert np.isnan(changes.half_width(changes.domain == 1)).all()


def test_halves_of_a_text_that_agree_and_disagree() -> None:
    order = np.arange(5.0)
    assert Changes(np.stack([order, order] * 2), np.ones(4), np.zeros(4)).agreement() == pytest.approx(1)
    assert Changes(np.stack([order, -order] * 2), np.ones(4), np.zeros(4)).agreement() == pytest.approx(-1)
    assert np.isnan(Changes(np.stack([order] * 3), np.ones(3), np.zeros(3)).agreement())


def test_experts_of_a_table_are_removed_by_their_contribution(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moe = MoEConfig(4, router=HashRouterConfig())
    hashed = write(tmp_path / "hashed.ckpt", replace(CONFIG, moe=moe), tokenizer=TOKENIZER.files)
    (tmp_path / "text.txt").write_text(TEXT)
    words = ["experts", str(hashed), f"--text={tmp_path / 'text.txt'}", "--exact=0:1", f"--output={tmp_path / 'out'}"]
    assert "use removal=contribution" in error_of(capsys, *words)
    main([*words, "--removal=contribution"])
    assert "without expert 1: contribution" in capsys.readouterr().out
    exact = pd.read_csv(tmp_path / "out" / "experts.csv").set_index(["layer", "expert"])
    assert exact["contribution"].notna().sum() == 1 and "route_around" not in exact
