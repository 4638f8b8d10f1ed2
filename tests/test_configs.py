"""The YAML files against the paper: sizes, hyper-parameters, and every model on every machine."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml

from nlgmoe import GPT, Experiment, load_config
from nlgmoe.config import GPTConfig
from nlgmoe.data import StreamedText
from nlgmoe.data.sampling import BatchRampUp, batch_size_after, check_ramp_up, micro_batches_per_step
from nlgmoe.experiment import parse_config
from nlgmoe.model.counting import count_parameters, flops_per_token
from nlgmoe.model.gpt import initialise
from nlgmoe.tools.hugging_face.families import FAMILIES as OPEN_FAMILIES

ROOT = Path(__file__).parents[1] / "configs"
GPUS = {"cpu": 1, "gpu": 1, "gpus_8": 8, "gpus_64": 64, "gpus_128": 128}
FAMILIES = ["dense", "moe", "pr_moe", "mos"]
BLOCKS = sorted(path.stem for path in (ROOT / "block").glob("*.yaml"))


class Published(NamedTuple):
    """A row of the paper: shape, size in billions (as the paper says it; to three digits), and the script's values."""

    layers: int
    hidden: int
    heads: int
    experts: int | list[int] | None
    says: str | None
    billions: float
    lr: float
    min_lr: float
    batch: int
    decay: float
    micro: int
    init_std: float = 0.014


# fmt: off
PAPER = {
    "dense/125m_dense": Published(12, 768, 12, None, "0.125", 0.125, 6e-4, 6e-5, 256, 260e9, 4),
    "dense/350m_dense": Published(24, 1024, 16, None, None, 0.356, 3e-4, 3e-5, 256, 260e9, 4),
    "dense/1.3b_dense": Published(24, 2048, 16, None, "1.3", 1.316, 2e-4, 2e-5, 512, 260e9, 2),
    "dense/6.7b_dense": Published(32, 4096, 32, None, "6.7", 6.658, 1.2e-4, 1.2e-5, 1024, 260e9, 4, 0.01),
    "moe/125m_moe_64": Published(12, 768, 12, 64, None, 1.911, 4.5e-4, 4.5e-6, 256, 300e9, 4),
    "moe/350m_moe_128": Published(24, 1024, 16, 128, "13", 13.149, 2e-4, 2e-6, 256, 300e9, 4),
    "moe/1.3b_moe_128": Published(24, 2048, 16, 128, "52", 52.471, 1.2e-4, 1e-6, 512, 300e9, 8),
    "pr_moe/350m_pr_moe_32_64": Published(24, 1024, 16, [32] * 10 + [64] * 2, "4", 4.117, 3e-4, 1e-6, 256, 300e9, 4),
    "pr_moe/1.3b_pr_moe_64_128": Published(24, 2048, 16, [64] * 10 + [128] * 2, "31", 31.392, 1.2e-4, 1e-6, 512, 300e9, 8),
    "mos/350m_mos_32_64": Published(21, 1024, 16, [32] * 8 + [64] * 2, "3.5", 3.542, 3e-4, 1e-6, 256, 300e9, 4),
    "mos/1.3b_mos_64_128": Published(21, 2048, 16, [64] * 8 + [128] * 2, "27", 26.944, 1.2e-4, 1e-6, 512, 300e9, 4),
}
# fmt: on

RAMP_UPS = {  # over the published tokens, in steps that every machine can make
    "dense/1.3b_dense": BatchRampUp(256, 256, 4_000_000_000),
    "dense/6.7b_dense": BatchRampUp(512, 512, 10_000_000_000),
}


@cache
def experiment_of(name: str) -> Experiment:
    return load_config(ROOT / f"{name}.yaml")


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / f"{name}.yaml").read_text())


def parse(*names: str) -> dict[str, Any]:
    """What train.py makes of the files, up to the point where it would build objects (which needs the GPUs)."""
    return parse_config([str(ROOT / f"{name}.yaml") for name in names])


def test_configs_have_every_row_of_the_paper_and_a_twin_of_every_family() -> None:
    paths = [path for path in ROOT.rglob("*.yaml") if path.parent.name not in ("reproduce", "gate")]
    files = {str(path.relative_to(ROOT).with_suffix("")) for path in paths}
    twins = {f"{family}/laptop" for family in FAMILIES}
    data = {"data/paper_blend", "data/pile_streaming"}
    data |= {f"block/{family}" for family in OPEN_FAMILIES if family not in ("qwen3", "granite", "gpt2")}
    assert files == {"quickstart", "finetune", *PAPER, *twins, *(f"hardware/{overlay}" for overlay in GPUS), *data}


@pytest.mark.parametrize("block", BLOCKS)
def test_block_config_is_that_of_its_family_and_goes_with_any_model(block: str) -> None:
    overlay = read(f"block/{block}")["model"]["config"]
    for name in ("moe/laptop", "pr_moe/laptop") if "moe" in overlay else ("pr_moe/laptop", "dense/laptop"):
        config = GPTConfig.from_dict(parse(name, f"block/{block}")["model"]["config"])
        assert config.norm == "rmsnorm" and config.rope_theta and not config.bias
        assert (config.moe is None) == (name == "dense/laptop")
    name, every = ("dense", {}) if block == "llama" else ("moe", {"model__config__moe__expert_interval": 1})
    files = [ROOT / f"{name}/laptop.yaml", ROOT / f"block/{block}.yaml"]
    config = GPTConfig.from_dict(parse_config(files, **every)["model"]["config"])
    assert OPEN_FAMILIES[block].differences(config) == []


def test_short_training_config_goes_with_any_model() -> None:
    experiment = load_config([ROOT / "dense/laptop.yaml", ROOT / "finetune.yaml"])
    data, module = experiment.data, experiment.module
    assert (data.seq_len, data.micro_batch_size, module.train_tokens) == (256, 2, 40 * 512)
    assert module.optimizer_config.lr == 5e-5 and experiment.trainer.precision == "bf16-mixed"


@pytest.mark.parametrize("name", PAPER)
def test_model_configs_have_the_papers_shapes_sizes_and_recipes(name: str) -> None:
    row, experiment = PAPER[name], experiment_of(name)
    module, data, trainer = experiment.module, experiment.data, experiment.trainer
    config, optimizer, schedule = module.config, module.optimizer_config, module.schedule
    shape = (config.num_layers, config.hidden_size, config.num_heads, config.ffn_size)
    assert shape == (row.layers, row.hidden, row.heads, 4 * row.hidden)
    assert (config.moe.num_experts if config.moe else None) == row.experts
    billions = count_parameters(replace(config, vocab_size_multiple=1)).total / 1e9
    assert round(billions, 3) == row.billions
    if row.says is not None:
        assert f"{billions:.{len(row.says.partition('.')[2])}f}" == row.says
    assert (optimizer.lr, optimizer.betas, optimizer.weight_decay) == (row.lr, (0.9, 0.95), 0.1)
    assert (schedule.shape, schedule.min_lr, schedule.warmup_tokens) == ("cosine", row.min_lr, 375e6)
    assert (schedule.decay_tokens, module.train_tokens) == (row.decay, 300e9)
    assert (config.vocab_size, config.seq_len, config.init_std) == (50257, 2048, row.init_std)
    assert (config.hidden_dropout, config.attention_dropout) == (0.1, 0.1)
    batch = (data.global_batch_size, data.micro_batch_size, data.max_eval_windows)
    assert batch == (row.batch, row.micro, 10 * row.batch)
    assert data.batch_ramp_up == RAMP_UPS.get(name)
    assert not data.document_attention and not data.mask_eod_loss and module.curriculum is None
    assert (data.corpus.prefix, data.corpus.split) == (["data/pile/pile_text_document"], [98, 2, 0])  # type: ignore[attr-defined]
    assert read(name)["data"]["tokenizer"] == "gpt2" and data.seq_len == config.seq_len
    assert trainer.default_root_dir == f"runs/{name.partition('/')[2]}"
    assert (trainer.gradient_clip_val, trainer.val_check_interval, trainer.check_val_every_n_epoch) == (1.0, 100, None)
    if (moe := config.moe) is not None:
        residual = not name.startswith("moe/")
        assert (moe.mlp_type, moe.residual_mix) == ("residual" if residual else "standard", "learned")
        assert (moe.top_k, moe.train_capacity_factor, moe.eval_capacity_factor, moe.min_capacity) == (1, 1.0, 1.0, 4)
        assert (moe.token_dropping, moe.random_token_selection, moe.loss_coeff) == (True, True, 0.01)


@pytest.mark.parametrize("overlay", GPUS)
def test_model_configs_run_on_every_machine(overlay: str) -> None:
    """Overlays hold the machine and nothing that is learned; a step has the published batch on each."""
    settings = read(f"hardware/{overlay}")
    assert set(settings) <= {"trainer", "data"} and set(settings.get("data", {})) <= {"micro_batch_size"}
    assert set(settings["trainer"]) <= {"accelerator", "devices", "num_nodes", "precision", "strategy"}
    parsed = parse("pr_moe/350m_pr_moe_32_64", f"hardware/{overlay}")
    trainer = parsed["trainer"]
    assert trainer["devices"] * trainer["num_nodes"] == GPUS[overlay]
    assert trainer["precision"] == ("32-true" if overlay == "cpu" else "bf16-mixed")
    assert (trainer["val_check_interval"], parsed["data"]["global_batch_size"]) == (100, 256)  # the model's file counts
    if overlay != "cpu":
        assert trainer["strategy"]["class_path"].rpartition(".")[2] == "ExpertParallelStrategy"
        options = trainer["strategy"]["init_args"]
        expected = (2 if GPUS[overlay] <= 8 else 1, GPUS[overlay])
        assert (options["stage"], options["expert_parallel_size"]) == expected
    for name, row in PAPER.items():
        micro = settings.get("data", {}).get("micro_batch_size", read(name)["data"]["micro_batch_size"])
        steps = micro_batches_per_step(row.batch, micro, GPUS[overlay])
        assert steps * micro * GPUS[overlay] == row.batch
        if (ramp_up := RAMP_UPS.get(name)) is not None:
            check_ramp_up(ramp_up, row.batch, micro)
            sizes = {batch_size_after(samples, 2048, row.batch, ramp_up) for samples in range(0, 6_000_000, 10_000)}
            assert sizes == {row.batch // 2, row.batch}
            assert all(size % (steps * GPUS[overlay]) == 0 for size in sizes)


def test_blend_config_replaces_a_models_corpus_and_nothing_else() -> None:
    name = "pr_moe/350m_pr_moe_32_64"
    plain, blended = (parse(name, *more, "hardware/cpu") for more in ((), ("data/paper_blend",)))
    parts = blended["data"]["corpus"].pop("init_args")["parts"]
    assert blended["data"].pop("corpus") == {"class_path": "nlgmoe.data.Blend"}
    assert blended["data"].pop("max_eval_windows") == 256
    del plain["data"]["max_eval_windows"], plain["data"]["corpus"], plain["config"], blended["config"]
    assert blended == plain
    corpora = [part["corpus"]["init_args"] for part in parts]
    assert len(parts) == 15 and sum(part["weight"] for part in parts) == pytest.approx(1)
    assert len({corpus["prefix"] for corpus in corpora}) == len({part["name"] for part in parts}) == len(parts)
    assert {tuple(corpus["split"]) for corpus in corpora} == {(98, 2, 0)}


def test_streamed_pile_config_goes_over_every_model() -> None:
    """It replaces the corpus and what belongs to it; on 8 GPUs every stream is read once."""
    settings = read("data/pile_streaming")
    assert set(settings) == {"data"} and set(settings["data"]) == {"corpus", "num_workers"}
    parsed = parse("pr_moe/350m_pr_moe_32_64", "data/pile_streaming", "hardware/gpus_8")["data"]
    corpus = StreamedText(**parsed["corpus"]["init_args"])
    assert parsed["corpus"]["class_path"].rpartition(".")[2] == "StreamedText" and parsed["global_batch_size"] > 0
    for row in PAPER.values():
        if row.micro <= 4:
            assert corpus.num_streams % (row.micro * 8 * parsed["num_workers"]) == 0  # docs/data.md


def apart_from_its_architecture(name: str) -> dict[str, Any]:
    """The settings that a model shares with another, and without a teacher."""
    settings = read(name)
    model, trainer = settings["model"], settings["trainer"]
    for setting in ("num_layers", "ffn_hidden_size", "moe"):
        model["config"].pop(setting, None)
    model.pop("distiller", None)
    del trainer["default_root_dir"]
    trainer["callbacks"] = [one for one in trainer["callbacks"] if one["class_path"] != "nlgmoe.StagedDistillation"]
    return settings


@pytest.mark.parametrize("family", FAMILIES)
def test_the_laptop_twins_differ_in_nothing_but_the_architecture(family: str) -> None:
    assert apart_from_its_architecture(f"{family}/laptop") == apart_from_its_architecture("dense/laptop")


GATE = sorted((ROOT.parent / "docs/examples/gate").glob("*.yaml"))


STRONG = sorted((ROOT.parent / "docs/examples/gate/strong").glob("*.yaml"))


@pytest.mark.parametrize("file", STRONG, ids=lambda file: file.stem)
def test_gate_configs_of_the_strong_baseline_have_its_flops(file: Path) -> None:
    base = [ROOT / f"{name}.yaml" for name in ("reproduce/base", "reproduce/moe_16", "gate/strong")]
    strong, config = (GPTConfig.from_dict(parse_config(files)["model"]["config"]) for files in (base, [*base, file]))
    assert flops_per_token(config) / flops_per_token(strong) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("file", GATE, ids=lambda file: file.stem)
def test_gate_configs_change_model_and_optimizer_alone(file: Path) -> None:
    """It is laid over the claims' setting, states its FLOPs, and computes."""
    entry = yaml.safe_load(file.read_text())
    assert set(entry) == {"model"} and set(entry["model"]) <= {"config", "optimizer"}
    changed = entry["model"].get("config", {})
    assert set(changed) <= {"moe"} and not [name for name in (changed.get("moe") or {}) if name.startswith("eval_")]
    base = [ROOT / f"reproduce/{name}.yaml" for name in ("base", "moe_16")]
    baseline, config = (GPTConfig.from_dict(parse_config(files)["model"]["config"]) for files in (base, [*base, file]))
    assert (config != baseline) == bool(changed)
    ratio = flops_per_token(config) / flops_per_token(baseline)
    text = file.read_text().partition("# FLOPs a token: ")[2]
    assert (f"{ratio:.3f} times" in text or f"{ratio:.2f} times" in text) if ratio != 1 else text.startswith("the bas")
    model = GPT(replace(config, num_layers=2))
    initialise(model, config, 0)
    tokens = torch.arange(64).view(2, 32)
    assert bool(model(tokens).hidden.isfinite().all())
