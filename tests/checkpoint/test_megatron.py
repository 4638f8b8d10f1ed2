"""Megatron-DeepSpeed's checkpoints: the imported model says what theirs does, and what it cannot be is refused by name."""

import os
import re
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nlgmoe import GPTConfig, MoEConfig, generate, load_pretrained
from nlgmoe.checkpoint.portable import load_model
from nlgmoe.checkpoint.reading import read_document
from nlgmoe.checkpoint.verify import find_problems
from nlgmoe.commands.main import main
from nlgmoe.data.tokenizer import Tokenizer
from nlgmoe.data.tokenizer_loading import train_byte_level_bpe
from nlgmoe.surgery import write_weights
from nlgmoe.tools.megatron.checkpoint import import_checkpoint
from nlgmoe.tools.megatron.checkpoint_files import load
from tests.checkpoint.megatron_model import (
    HEADS,
    HIDDEN,
    INNER,
    LAYERS,
    POSITIONS,
    ROWS,
    GPTModel,
    arguments,
    write,
    write_from_engine,
)
from tests.support.spawn import spawn

TOKENS = torch.randint(ROWS, (3, POSITIONS), generator=torch.Generator().manual_seed(1))
PR_MOE = {"num_experts": [2, 4], "mlp_type": "residual"}
MODELS = {
    "dense": {},
    "top-2, every layer": {"num_experts": [4], "topk": 2, "moe_top2_2nd_expert_sampling": False, "expert_interval": 1},
    "a dense position": {"num_experts": [1, 4]},
    "PR-MoE": PR_MOE,
}


@torch.no_grad()
def logits(checkpoint: Path, tokens: Tensor = TOKENS) -> Tensor:
    model = load_model(checkpoint)
    return model.logits(model(tokens).hidden)


def imported(folder: Path, **options: Any) -> Tensor:
    import_checkpoint(folder / "theirs", folder / "ours.ckpt", overwrite=True, **options)
    assert list(find_problems(folder / "ours.ckpt")) == []
    return logits(folder / "ours.ckpt")


def same(ours: Tensor, theirs: Tensor) -> None:
    assert theirs.std() > 0.3
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def edit(folder: Path, change: Callable[[dict[str, Any]], Any], name: str = "mp_rank_00_model_states.pt") -> None:
    """Write a file of `folder/global_step7` again, changed."""
    file = folder / "global_step7" / name
    state = load(file)
    if "args" in state:  # placeholders cannot be written
        state.pop("rng_state", None)
        state["args"].model_type = None
    change(state)
    torch.save(state, file.with_suffix(".new"))
    file.with_suffix(".new").replace(file)


@pytest.mark.parametrize("kind", MODELS)
def test_logits_are_those_of_deepspeeds_layers(kind: str, tmp_path: Path) -> None:
    theirs = write(tmp_path / "theirs", arguments(**MODELS[kind]))
    same(imported(tmp_path), theirs(TOKENS))


def test_import_megatron_reads_what_deepspeeds_engine_writes_on_two_ranks(tmp_path: Path) -> None:
    spawn(2, write_from_engine, tmp_path / "theirs", PR_MOE, folder=tmp_path / "ranks")
    assert len(list((tmp_path / "theirs" / "global_step0").glob("layer_*_expert_*.pt"))) == 6
    same(imported(tmp_path), GPTModel(arguments(**PR_MOE))(TOKENS))


def test_import_megatron_makes_half_precision_fp32_and_files_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = write(tmp_path / "theirs", arguments(**PR_MOE), dtype=torch.float16)
    monkeypatch.setattr(write_weights, "SHARD_VALUES", 3000)
    same(imported(tmp_path), theirs(TOKENS))
    files = list((tmp_path / "ours.ckpt").glob("model-*.safetensors"))
    assert len(files) > 4 and max(file.stat().st_size for file in files) < 3000 * 4 + 4000


def test_import_megatron_reads_version_2_as_3_and_refuses_older_ones(tmp_path: Path) -> None:
    theirs = write(tmp_path / "theirs", arguments(), 2.0)
    same(imported(tmp_path), theirs(TOKENS))
    for version in (0, 1.0):
        edit(tmp_path / "theirs", lambda state, version=version: state.update(checkpoint_version=version))
        with pytest.raises(ValueError, match=r"checkpoint_version=\d\.0 is older than 2 .*; load and save it"):
            imported(tmp_path, qkv="thirds")


def test_import_megatron_reads_queries_keys_and_values_in_a_row_since_fpdt(tmp_path: Path) -> None:
    theirs = write(tmp_path / "theirs", arguments(ds_sequence_parallel_fpdt=False))
    expected = theirs(TOKENS)
    same(imported(tmp_path), expected)
    edit(tmp_path / "theirs", lambda state: delattr(state["args"], "ds_sequence_parallel_fpdt"))
    assert (imported(tmp_path) - expected).abs().max() > 0.1
    same(imported(tmp_path, qkv="thirds"), expected)
    edit(tmp_path / "theirs", lambda state: state.update(checkpoint_version=4.0))
    with pytest.raises(ValueError, match=r"checkpoint_version=4\.0 is unknown .*--qkv"):
        imported(tmp_path)
    same(imported(tmp_path, qkv="thirds"), expected)


def test_import_megatron_cuts_vocabulary_and_positions(tmp_path: Path) -> None:
    theirs = write(tmp_path / "theirs", arguments(seq_length=10))
    assert import_checkpoint(tmp_path / "theirs", tmp_path / "a.ckpt").vocab_size == ROWS
    config = import_checkpoint(tmp_path / "theirs", tmp_path / "b.ckpt", vocab_size=50)
    assert (config.vocab_size, config.padded_vocab_size, config.seq_len) == (50, 56, 10)
    tokens = TOKENS[:, :10] % 50
    same(logits(tmp_path / "b.ckpt", tokens), theirs(tokens)[..., :50])
    with pytest.raises(ValueError, match="vocab_size=65 must be between 1 and the 64 rows"):
        import_checkpoint(tmp_path / "theirs", tmp_path / "c.ckpt", vocab_size=65)


def test_import_megatron_takes_the_configuration_of_the_run(tmp_path: Path) -> None:
    write(tmp_path / "theirs", arguments(**PR_MOE, moe_top2_2nd_expert_sampling=False))
    moe = MoEConfig(
        [2, 4], mlp_type="residual", train_capacity_factor=1.5, eval_capacity_factor=2.0, min_capacity=2,
        second_expert="argmax", loss_coeff=0.02, aux_scope="rank",
    )  # fmt: skip
    expected = GPTConfig(
        ROWS, POSITIONS, LAYERS, HIDDEN, HEADS, INNER, 0.1, 0.1, init_std=0.014, layer_norm_eps=1e-3, vocab_size_multiple=8,
        moe=moe,
    )  # fmt: skip
    assert import_checkpoint(tmp_path / "theirs", tmp_path / "ours.ckpt") == expected
    document = read_document(tmp_path / "ours.ckpt")
    assert (document["global_step"], document["tokens_seen"]) == (7, 336)


def test_import_megatron_command_writes_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = Tokenizer(train_byte_level_bpe(iter(["the king"]), 259), "tiny")
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text(tokenizer.files["tokenizer.json"])
    write(tmp_path / "theirs", arguments(**PR_MOE), rows=264)
    command = ["import-megatron", str(tmp_path / "theirs"), str(tmp_path / "ours.ckpt"), "--tokenizer"]
    main([*command, str(tmp_path / "tokenizer")])
    assert "step 7, 336 tokens" in capsys.readouterr().out
    trained = load_pretrained(tmp_path / "ours.ckpt")
    assert trained.model.config.vocab_size == tokenizer.vocab_size == 259
    generate(trained.model, torch.tensor([trained.tokenizer.encode("the")]), 4)
    with pytest.raises(SystemExit):
        main([*command, str(tmp_path / "tokenizer"), "--vocab-size=258", "--overwrite"])
    assert "vocab_size=258 is below the 259 ids of tokenizer" in capsys.readouterr().err


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    write(tmp_path / "theirs", arguments(**PR_MOE))
    return tmp_path / "theirs"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("tensor_model_parallel_size", 2, "--tensor-model-parallel-size"),
        ("swiglu", True, "--swiglu"),
        ("topk", 3, "top_k"),
    ],
)
def test_import_megatron_refuses_a_model_of_another_kind(
    name: str, value: Any, message: str, theirs: Path, tmp_path: Path
) -> None:
    edit(theirs, lambda state: setattr(state["args"], name, value))
    with pytest.raises(ValueError, match=rf"^{message}[=: ][^\n]*$"):
        imported(tmp_path)
    assert not (tmp_path / "ours.ckpt").exists()


def test_import_megatron_refuses_exact_gelu_until_it_is_accepted(theirs: Path, tmp_path: Path) -> None:
    edit(theirs, lambda state: setattr(state["args"], "bias_gelu_fusion", False))
    with pytest.raises(ValueError, match=r"^bias_gelu_fusion"):
        imported(tmp_path)
    same(imported(tmp_path, accept_tanh_gelu=True), GPTModel(arguments(**PR_MOE))(TOKENS))


EXPERT = "layer_1_expert_2_mp_rank_00_model_states.pt"
PART = "language_model.encoder.layers.3.mlp.deepspeed_moe.experts.deepspeed_experts.2.dense_4h_to_h.weight"


def flip(theirs: Path) -> None:
    file = theirs / "global_step7" / EXPERT
    weight = torch.load(file, weights_only=True)[PART].numpy().tobytes()
    file.write_bytes(file.read_bytes().replace(weight, weight[:-1] + bytes([weight[-1] ^ 64])))


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "lacks encoder.layers.0.input_layernorm.bias": lambda theirs: edit(
        theirs, lambda state: state["module"]["language_model"]["encoder"].pop("layers.0.input_layernorm.bias")
    ),
    f"has no {EXPERT}": lambda theirs: (theirs / "global_step7" / EXPERT).unlink(),
    "not only expert 2 of layer 3": lambda theirs: shutil.copy(
        theirs / "global_step7" / EXPERT.replace("expert_2", "expert_3"), theirs / "global_step7" / EXPERT
    ),
    "the checksum of": flip,
    "holds no model; use a checkpoint that Megatron-DeepSpeed wrote with --no-pipeline-parallel": lambda theirs: edit(
        theirs, lambda state: state.update(module=None)
    ),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_import_megatron_refuses_files_that_do_not_fit(message: str, theirs: Path, tmp_path: Path) -> None:
    DAMAGE[message](theirs)
    with pytest.raises(ValueError, match=rf"^[^\n]*{re.escape(message)}[^\n]*$"):
        imported(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]  # nothing half written


@pytest.mark.parametrize(
    "file",
    ["model.bin", "iter_0000007/mp_rank_00/model_optim_rng.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt", "latest"],
)
def test_import_megatron_refuses_other_folders_with_the_flags_that_they_need(file: str, tmp_path: Path) -> None:
    (tmp_path / "theirs" / file).parent.mkdir(parents=True)
    (tmp_path / "theirs" / file).write_text("global_step9")
    needed = "saved with --deepspeed and --no-pipeline-parallel, and with a ZeRO stage below 3"
    with pytest.raises(ValueError, match=rf"^[^\n]* has no mp_rank_00_model_states.pt; [^\n]*{needed}$"):
        imported(tmp_path)


class Runs:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def test_import_megatron_runs_nothing_in_a_file(theirs: Path, tmp_path: Path) -> None:
    evidence = tmp_path / "evidence"
    edit(theirs, lambda state: state.update(args=Namespace(**vars(state["args"]), run=Runs(f"touch {evidence}"))))
    with pytest.raises(ValueError, match=r"mp_rank_00_model_states.pt holds posix.system, .*could run code"):
        imported(tmp_path)
    assert not evidence.exists()
