"""The arguments that Megatron prints or saves become the settings of the flags that they come from."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from nlgmoe.tools.megatron.from_megatron import read_launch, translated
from tests.checkpoint import megatron_model
from tests.megatron.writing import NEEDED, launched, settings_of

# As Megatron-DeepSpeed has them with NEEDED and FLAGS, on 4 ranks: defaults, and values that it fills in itself.
FLAGS = (
    "--disable-moe-token-dropping --no-bias-gelu-fusion --fp16 --split 98,2,0 --moe-expert-parallel-size 4 --deepspeed"
)
ARGUMENTS: dict[str, Any] = {
    **{name.lstrip("-").replace("-", "_"): value for name, value in NEEDED.items()},
    **{"num_experts": [8], "data_path": ["corpus"], "lr": 0.001, "split": "98,2,0", "moe_expert_parallel_size": 4},
    **{"moe_token_dropping": False, "bias_gelu_fusion": False, "fp16": True, "bf16": False, "deepspeed": True},
    **{"ffn_hidden_size": 256, "kv_channels": 16, "num_key_value_heads": 4, "add_bias_linear": True, "swiglu": False},
    **{"weight_decay": 0.01, "start_weight_decay": 0.01, "end_weight_decay": 0.01, "global_batch_size": 8},
    **{"zero_stage": 1.0, "initial_loss_scale": 4294967296, "rotary_percent": 1.0, "num_experts_teacher": [1]},
    **{"train_samples": None, "save": None, "optimizer": "adam", "loss_scale": None, "DDP_impl": "local"},
    **{"world_size": 4, "bert_binary_head": True, "retro_workdir": None, "tensor_model_parallel_size": 1},
}


def printed(changes: dict[str, Any], written: str = "{}") -> str:
    """As `_print_args` of megatron/arguments.py prints them."""
    lines = [f"  {name} {'.' * (48 - len(name))} {value}" for name, value in (ARGUMENTS | changes).items()]
    block = [
        "------------------------ arguments ------------------------",
        *sorted(lines, key=str.lower),
        "-------------------- end of arguments ---------------------",
    ]
    return "".join(written.format(line) + "\n" for line in ["using world size: 4", *block, "building GPT model ..."])


def settings(source: Path) -> dict[str, Any]:
    found = settings_of(read_launch([str(source)], ()))
    found["trainer"].pop("default_root_dir")
    return found


def expected() -> dict[str, Any]:
    found = settings_of(launched(FLAGS))
    found["trainer"].pop("default_root_dir")
    found["trainer"].pop("devices")
    return found


@pytest.mark.parametrize("line", ["{}", "worker-0: {}", "\x1b[32m{}\x1b[0m"])
def test_the_last_argument_block_of_a_log(line: str, tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    log.write_text(printed({"num_layers": 6}, line) + printed({}, line))
    assert settings(log) == expected()
    assert (
        "# 2 other arguments of train.log are in no table and were passed over: bert_binary_head, retro_workdir."
        in translated(read_launch([str(log)], ()))
    )


def test_the_arguments_of_a_checkpoint(tmp_path: Path) -> None:
    megatron_model.write(tmp_path / "run", megatron_model.arguments())  # tensors of any model
    file = tmp_path / "run" / "global_step7" / "mp_rank_00_model_states.pt"
    megatron_model.torch.save({"module": {}, "args": Namespace(**ARGUMENTS)}, file)
    assert settings(tmp_path / "run") == expected()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"swiglu": True}, "train.log: --swiglu: SwiGLU is not translated"),
        ({"add_position_embedding": False}, "--no-position-embedding: the model here"),
        ({"end_weight_decay": 0.1}, "--end-weight-decay 0.1: weight decay is constant"),
        ({"data_path": ["0.3", "a", "b"]}, "--data-path 0.3 a b: is not a list of weight and prefix"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    log.write_text(printed(changes))
    with pytest.raises(ValueError) as error:
        translated(read_launch([str(log)], ()))
    assert message in str(error.value)
