"""Pruning: which experts stay, that nothing else changes, and that a run heals the result with the whole model as teacher."""

import re
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from torch import Tensor
from torch.nn.functional import cross_entropy

from nlgmoe import GPT, HashRouterConfig, SigmoidRouterConfig, load_model, load_pretrained
from nlgmoe.checkpoint.reading import Checkpoint
from nlgmoe.checkpoint.verify import find_problems
from nlgmoe.cli.train import main as train
from nlgmoe.commands.main import main
from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.eval.importance import measure_influence, measure_use
from nlgmoe.layers import dispatch
from nlgmoe.layers.moe import moe_layers
from nlgmoe.layers.router import Router, TopKRouter
from nlgmoe.parts import RouterConfig
from nlgmoe.pyramid import experts_at
from nlgmoe.surgery.prune import best_ranked, prune, pruned_config
from tests.support.checkpoints import TOKENIZER, write
from tests.support.commands import TINY, error_of
from tests.support.processes import ROOT

TOKENS = torch.randint(61, (1, 16), generator=torch.Generator().manual_seed(0))
PAIR = TOKENS[:, :2]  # uses four experts of a layer at most
MOES = {
    "softmax": MoEConfig([6, 0, 5], top_k=2, mlp_type="residual"),
    "sigmoid": MoEConfig([6, 0, 5], top_k=2, token_dropping=False, router=SigmoidRouterConfig()),
    "gated": MoEConfig([6, 0, 5], top_k=2, mlp_type="residual", residual_mix="sigmoid"),
}
GROUPS = MoEConfig([6, 0, 8], top_k=2, groups=[2, 1], mlp_type="residual", residual_mix="sigmoid", token_dropping=False)


def batch_of(tokens: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
    mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    return {"tokens": tokens, "targets": tokens.roll(-1, 1), "token_mask": mask, "domain": torch.zeros(len(tokens))}


def whole(folder: Path, kind: str) -> Path:
    moes = MOES | {"slots": replace(MOES["softmax"], eval_token_dropping=True)}
    config = GPTConfig(300, 16, 6, 16, 2, init_std=0.3, moe=moes[kind])
    return write(folder / "whole.ckpt", config, tokenizer=TOKENIZER.files)


@torch.no_grad()
def logits(model: GPT, tokens: Tensor = TOKENS) -> Tensor:
    return model.logits(model(tokens).hidden)


@pytest.mark.parametrize("kind", MOES)
def test_pruning_experts_that_no_token_uses_changes_no_output(kind: str, tmp_path: Path) -> None:
    """The weights of two experts are renormalised, so that those of a token do not depend on the rest."""
    source = whole(tmp_path, kind)
    model = load_model(source)
    use = measure_use(model, [batch_of(PAIR)])
    used = [int((weights > 0).sum()) for weights in use.weights]
    numbers = [used[0], 0, used[1]]
    assert used[0] < 6 and used[1] < 5
    kept = best_ranked(use.weights, pruned_config(model.config, numbers))
    config = prune(source, tmp_path / "small.ckpt", numbers, kept)
    assert list(find_problems(Checkpoint(tmp_path / "small.ckpt"))) == []
    small = load_model(tmp_path / "small.ckpt")
    assert small.config == config and [len(layer.experts.up_bias) for layer in moe_layers(small)] == used
    torch.testing.assert_close(logits(small, PAIR), logits(model, PAIR), rtol=1e-6, atol=1e-6)
    assert Checkpoint(tmp_path / "small.ckpt").tokenizer() == TOKENIZER.files


@pytest.mark.parametrize("kind", ["softmax", "gated", "slots"])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@torch.no_grad()
def test_pruning_use_is_the_sum_of_weights_and_saliency_the_mean_weight_times_norm(
    dtype: torch.dtype, error: float, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saliency: REAP's, of each expert over its tokens. In bf16 and in slots experts compute rows of no token too."""
    monkeypatch.setattr(dispatch, "has_slots", lambda device: True)
    model = load_model(whole(tmp_path, kind)).to(dtype)
    layer = moe_layers(model)[1]
    inputs: list[Tensor] = []
    handle = layer.register_forward_hook(lambda module, args, output: inputs.append(args[0].flatten(0, 1)))
    routing = model(TOKENS).routings[1]
    loss = cross_entropy(logits(model)[0].float(), TOKENS.roll(-1, 1)[0])
    handle.remove()
    use = measure_use(model, [batch_of(TOKENS), batch_of(TOKENS)])
    for expert in range(5):
        weights = routing.weight[routing.expert == expert]
        terms = [
            routing.weight[token, choice]
            * layer.experts(inputs[0][token : token + 1], torch.eye(5).long()[expert]).norm()
            for token, choice in ((routing.expert == expert) & routing.kept).nonzero().tolist()
        ]
        assert float(use.weights[1][expert]) == pytest.approx(2 * float(weights.sum()), rel=error)
        assert float(use.saliency[1][expert]) == pytest.approx(float(sum(terms)) / max(1, len(terms)), rel=error)
    assert use.loss == pytest.approx(float(loss), rel=error) and use.tokens == 32


def test_pruning_keeps_the_best_ranked_experts_in_their_order() -> None:
    weights = [torch.tensor([1.0, 5, 5, 3]), torch.tensor([0.0, 2])]
    assert best_ranked(weights, GPTConfig(61, 16, 4, 16, 2, moe=MoEConfig([2, 1]))) == [[1, 2], [1]]


@pytest.mark.parametrize("by", ["use", "reap"])
@pytest.mark.parametrize("router", [None, SigmoidRouterConfig()], ids=["softmax", "sigmoid"])
def test_pruning_keeps_groups_and_a_shared_expert(by: str, router: SigmoidRouterConfig | None, tmp_path: Path) -> None:
    """Experts that are not missed are removed; a token chooses in the same group as before."""
    config = GPTConfig(300, 16, 6, 16, 2, init_std=0.3, moe=replace(GROUPS, router=router))
    source = write(tmp_path / "whole.ckpt", config, tokenizer=TOKENIZER.files)
    model, text, small = load_model(source), tmp_path / "text.txt", tmp_path / "small.ckpt"
    use = measure_use(model, [batch_of(TOKENS)])
    numbers = [4, 0, 4]
    kept = best_ranked(use.weights if by == "use" else use.saliency, pruned_config(config, numbers))
    for experts, size in zip(kept, (6, 8), strict=True):
        assert [sum(number * 2 // size == group for number in experts) for group in (0, 1)] == [2, 2]
    prune(source, small, numbers, kept)
    assert list(find_problems(Checkpoint(small))) == []
    pruned = load_model(small)
    for name, entry in pruned.state_dict().items():
        if ".coefficient." in name or ".mlp." in name:
            assert torch.equal(entry, model.state_dict()[name])
    # Tokens whose two experts are kept in every layer, and whose group is the same: the whole model's routing, renumbered.
    inputs = torch.randn(200, 16, generator=torch.Generator().manual_seed(1))
    for before, after, experts in zip(moe_layers(model), moe_layers(pruned), kept, strict=True):
        chosen, rest = before.router(inputs).expert, after.router(inputs).expert
        same = torch.isin(chosen, torch.tensor(experts)).all(dim=1)
        assert same.any()
        if router is None:  # the group's maximum is one of the two
            assert torch.equal(torch.tensor(experts)[rest[same]], chosen[same])
    text.write_text("It was the best of times. " * 20)
    arguments = ["prune", str(source), str(tmp_path / "by.ckpt"), "--num-experts=4", f"--by={by}", f"--text={text}"]
    main(arguments)
    assert load_model(tmp_path / "by.ckpt").config.moe.num_experts == [4, 0, 4]


@dataclass(frozen=True)
class TemperatureConfig(RouterConfig):
    """The paper's router with a learned temperature; `declared`: of a class that says that no expert has a row of it."""

    declared: bool = True

    def build(self, config: GPTConfig, block: int) -> Router:
        assert config.moe is not None
        kind = Declared if self.declared else Temperature
        return kind(config.moe, config.hidden_size, experts_at(config, block), block)


class Temperature(TopKRouter):
    roles: ClassVar[Any] = {"temperature": "scale"}  # added to those of TopKRouter

    def __init__(self, *words: Any) -> None:
        super().__init__(*words)
        self.temperature = torch.nn.Parameter(torch.empty(1))


class Declared(Temperature):
    not_per_expert = ("temperature",)


def test_pruning_keeps_what_a_router_declares_and_refuses_other_shapes_by_name(tmp_path: Path) -> None:
    moe = replace(MOES["softmax"], router=TemperatureConfig())
    config = GPTConfig(300, 16, 6, 16, 2, moe=moe)
    prune(write(tmp_path / "whole.ckpt", config), tmp_path / "small.ckpt", [4, 0, 3], [[0, 1, 2, 4], [0, 1, 4]])
    routers = [layer.router for layer in moe_layers(load_model(tmp_path / "small.ckpt"))]
    assert [(tuple(router.temperature.shape), len(router.weight)) for router in routers] == [((1,), 4), ((1,), 3)]
    unknown = replace(config, moe=replace(moe, router=TemperatureConfig(declared=False)))
    with pytest.raises(
        ValueError, match=r"Temperature\.temperature, \[1\], has no row for each of 6 experts; if pruning"
    ):
        pruned_config(unknown, [4, 0, 3])


def test_a_run_is_pruned_and_healed_by_the_commands(
    pocket_pile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, small, healed = tmp_path / "a run", tmp_path / "a small one.ckpt", tmp_path / "healed"
    quiet = ["--trainer.enable_progress_bar=false", f"--data.data_dir={pocket_pile}"]
    corpus = ["--data.corpus=nlgmoe.data.PocketPile", '--data.corpus.init_args.domains=["code"]']
    corpus.append("--data.document_attention=true")
    config = ["--config", str(ROOT / "configs/moe/laptop.yaml"), *TINY, *quiet, *corpus]
    ends = ["--model.train_tokens=256", "--model.schedule.decay_tokens=256", "--model.curriculum.tokens=128"]
    ends += ["--model.curriculum.start=16", "--model.schedule.min_lr=2e-4"]
    train(["fit", *config, *ends, f"--trainer.default_root_dir={run}"])
    before = len(load_pretrained(run).model.blocks[1].moe.experts.up_bias)
    capsys.readouterr()
    written = (run / "config.yaml").read_text()
    elsewhere = yaml.safe_load(written)
    elsewhere["trainer"] |= {"accelerator": "gpu", "devices": 8}  # of a machine that has them
    elsewhere["trainer"]["logger"] = {"class_path": "TensorBoardLogger", "init_args": {"save_dir": str(run)}}
    (run / "config.yaml").write_text(yaml.safe_dump(elsewhere))
    main(["prune", str(run), str(small), "--num-experts=[2]", "--windows=2"])
    (run / "config.yaml").write_text(written)
    said = capsys.readouterr().out
    assert f"block 1: 2 of {before} experts, with " in said and " nats per token (" in said
    # The run's text is what the loss is measured on.
    ours = yaml.safe_load(small.with_suffix(".yaml").read_text())
    data, logger = ours["data"], ours["trainer"]["logger"]
    assert logger is None and ours["model"]["warm_start"]["strict"]
    assert data["document_attention"] and data["tokenizer"] == str(small) and data["data_dir"] == str(pocket_pile)
    corpus = data["corpus"]
    assert corpus["class_path"] == "nlgmoe.data.PocketPile" and corpus["init_args"]["domains"] == ["code"]
    files = ["--config", str(run / "config.yaml"), "--config", str(small.with_suffix(".yaml"))]
    teacher = ["--model.distiller=nlgmoe.MixtureOfStudents", f"--model.distiller.init_args.teacher={run}"]
    ends = ["--model.train_tokens=28", "--trainer.max_steps=2"]
    train(["fit", *files, *teacher, *ends, f"--trainer.default_root_dir={healed}"])
    assert load_pretrained(healed).model.config.moe.num_experts == [2]


def test_pruning_refuses_models_and_numbers_that_do_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, small = whole(tmp_path, "softmax"), tmp_path / "small.ckpt"
    for arguments, message in (
        ((small, "--num-experts=[3,0]"), "num_experts=[3, 0] has 2 numbers, the model has [6, 0, 5]"),
        ((small, "--num-experts=6"), "num_experts=[6, 0, 5] equals the model's; give a smaller number"),
        ((small, "--num-experts=[1,0,5]"), "top_k=2 must be between 1 and the smallest num_experts (1)"),
        ((small, "--num-experts=[3,0,4]"), "no config.yaml that names its text; give --text FILE"),
        ((source, "--num-experts=[3,0,4]", "--text=x", "--overwrite"), "is the checkpoint to prune, the teacher"),
    ):
        assert message in error_of(capsys, "prune", source, *arguments)
    assert not small.exists()
    config = GPTConfig(61, 16, 6, 16, 2, moe=GROUPS)
    for counts in ([4, 0, 5], [2, 0, 4]):  # not divisible; one expert a group, of which top_k=2 choose
        with pytest.raises(ValueError, match=rf"^groups=\[2, 1\] .* num_experts={re.escape(str(counts))}"):
            pruned_config(config, counts)
    config = GPTConfig(61, 16, 2, 16, 2, moe=MoEConfig(4, router=HashRouterConfig()))
    with pytest.raises(ValueError, match="HashRouter does not derive from TopKRouter"):
        pruned_config(config, [2])


@torch.no_grad()
def test_pruning_reads_text_as_prepare_data_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "It was the best\r\nof times.\r\n" * 20
    (tmp_path / "text.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    source = whole(tmp_path, "softmax")
    main(["prune", str(source), str(tmp_path / "small.ckpt"), "--num-experts=[3,0,4]", f"--text={tmp_path}/text.txt"])
    ids = torch.tensor(TOKENIZER.encode(text))
    tokens, targets = (torch.full((-(-len(ids) // 16) * 16,), TOKENIZER.eod_id) for _ in range(2))
    targets[: len(ids)], tokens[1 : len(ids)] = ids, ids[:-1]
    loss = cross_entropy(logits(load_model(source), tokens.view(-1, 16)).flatten(0, 1)[: len(ids)], targets[: len(ids)])
    said = capsys.readouterr()
    assert f"loss {loss:.4f} -> " in said.out
    assert "measuring use: 100%" in said.err and "measuring loss: 100%" in said.err


@torch.no_grad()
def test_block_influence_is_one_minus_the_mean_cosine_of_input_and_output() -> None:
    """ShortGPT's, arXiv 2403.03853. Padding does not count, and batches of different sizes weigh by their tokens."""
    model = GPT(GPTConfig(61, 16, 3, 16, 2, init_std=0.3, moe=MoEConfig(4))).eval()
    tokens = torch.randint(61, (3, 16), generator=torch.Generator().manual_seed(0))
    masks = torch.ones_like(tokens, dtype=torch.bool)
    masks[0, 5:] = False
    inputs: list[list[Tensor]] = []
    for row, mask in zip(tokens, masks, strict=True):
        states: list[Tensor] = []
        handles = [b.register_forward_pre_hook(lambda _, x, s=states: s.append(x[0][0])) for b in model.blocks]
        handles.append(model.final_norm.register_forward_pre_hook(lambda _, x, s=states: s.append(x[0][0])))
        model(row[mask].unsqueeze(0))
        for handle in handles:
            handle.remove()
        inputs.append(states)
    states = [torch.cat(parts).double() for parts in zip(*inputs, strict=True)]  # of each block, of all tokens
    expected = [float(1 - (x * y).sum(-1).div(x.norm(dim=-1) * y.norm(dim=-1)).mean()) for x, y in pairwise(states)]
    found = measure_influence(model, [batch_of(tokens[:1], masks[:1]), batch_of(tokens[1:], masks[1:])])
    assert found == pytest.approx(expected, abs=1e-6) and min(found) > 0.01
    assert not any(block._forward_hooks for block in model.blocks)
