"""Every flag of the table does what the table says, or is refused by name."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from nlgmoe.experiment import parse_config
from nlgmoe.tools.megatron.flags import FLAGS, IGNORED, ROWS
from nlgmoe.tools.megatron.from_megatron import translated
from tests.megatron.writing import get, launched, settings_of

# One line for every flag that is no setting of its own: what is added to the launch, and what that changes.
EFFECTS: list[tuple[str, dict[str, Any]]] = [
    ("--seq-length 16", {"model.config.seq_len": 16}),
    ("--num-experts 1", {"model.config.moe": None}),
    ("--num-experts 8 16", {"model.config.moe.num_experts": [8, 16]}),
    ("--topk 2", {"model.config.moe.top_k": 2, "model.config.moe.second_expert": "sample"}),
    ("--topk 2 --disable-moe-top2-2nd-expert-sampling", {"model.config.moe.second_expert": "argmax"}),
    (
        "--disable-moe-token-dropping",
        {"model.config.moe.token_dropping": False, "model.config.moe.eval_token_dropping": False},
    ),
    ("--adam-beta1 0.5", {"model.optimizer.betas": [0.5, 0.999]}),
    ("--adam-beta2 0.5", {"model.optimizer.betas": [0.9, 0.5]}),
    ("--fp16", {"trainer.precision": "16-mixed", "trainer.strategy.init_args.initial_scale_power": 11}),
    ("--bf16", {"trainer.precision": "bf16-mixed"}),
    ("--train-tokens 999", {"model.train_tokens": 999}),
    ("--train-samples 20", {"model.train_tokens": 16 * 32}),  # whole steps
    ("--train-samples 20 --train-tokens 480", {"model.train_tokens": 480}),
    ("--exit-duration-in-mins 1501", {"trainer.max_time": "01:01:01:00"}),
    ("--global-batch-size 64", {"data.global_batch_size": 64, "data.max_eval_windows": 6400}),
    (
        "--global-batch-size 16 --rampup-batch-size 8 8 100 --train-samples 215",
        {"data.batch_ramp_up": {"start": 8, "increment": 8, "tokens": 3200}, "model.train_tokens": 215 * 32},
    ),
    ("--data-path 1.0 other", {"data.corpus.init_args.prefix": "other"}),
    ("--data-path 3 a/x 1e-4 b/x", {"data.corpus.init_args.parts.1.name": "b/x"}),  # no name twice
    ("--data-path 3 a/x 1e-4 b/x", {"data.corpus.init_args.parts.1.weight": 1e-4}),
    ("--split 8,2", {"data.corpus.init_args.split": [8, 2, 0]}),
    ("--vocab-file a/gpt2-vocab.json", {"data.tokenizer": "gpt2"}),
    ("--vocab-file a/vocab.json --merge-file a/merges.txt", {"data.tokenizer": "a"}),
    ("--seed 5", {"model.seed": 5, "data.seed": 5}),
    (
        "--save x --save-interval 9 --load x",
        {"trainer.default_root_dir": "x", "trainer.callbacks.0.init_args.milestones": 9},
    ),
    ("--eval-iters 3", {"data.max_eval_windows": 24}),
    ("--checkpoint-activations", {"model.activation_checkpointing": True}),
    ("--deepspeed-activation-checkpointing", {"model.activation_checkpointing": True}),
    ("--zero-stage 2", {"trainer.strategy.init_args.stage": 2}),
    ("--kd --load-teacher a", {"model.distiller.class_path": "nlgmoe.MixtureOfStudents"}),
    ("--mos --load-teacher a", {"model.distiller.init_args": {"teacher": "a", "beta": 1.0, "temperature": 1.0}}),
]


@pytest.mark.parametrize(("flags", "expected"), EFFECTS, ids=[flags for flags, _ in EFFECTS])
def test_flags_change_what_the_table_says(flags: str, expected: dict[str, Any]) -> None:
    settings = settings_of(launched(flags))
    assert {path: get(settings, path) for path in expected} == expected


UNCHANGED = {name: keys for name, keys in FLAGS.items() if "setting" in keys}
VALUES = {"int": 7, "float": 0.75, "str": "any"}  # no flag's default


def value_of(keys: dict[str, Any]) -> Any:
    return keys["allowed"][-1] if "allowed" in keys else VALUES[keys["type"]]


def test_flags_with_a_setting_of_their_own_give_it_their_value(tmp_path: Path) -> None:
    given = " ".join(f"{name} {value_of(keys)}" for name, keys in UNCHANGED.items())
    text = translated(launched(f"--mos {given}"))
    settings, expected = yaml.safe_load(text), {keys["setting"]: value_of(keys) for keys in UNCHANGED.values()}
    assert len(expected) == len(UNCHANGED)
    assert {path: get(settings, path) for path in expected} == expected
    (tmp_path / "translated.yaml").write_text(text)
    parse_config([tmp_path / "translated.yaml"])  # the settings exist


def test_flags_of_the_table_all_have_a_case_above() -> None:
    tried = {word for flags, _ in EFFECTS for word in flags.split() if word.startswith("--")} | UNCHANGED.keys()
    tried |= {"--deepspeed_config"}  # test_deepspeed_configuration_gives_...
    tried |= {"--max-position-embeddings", "--merge-file"}  # only checked
    assert {name for name in FLAGS if ROWS[name].section != IGNORED} == tried


@pytest.mark.parametrize(
    ("launcher", "devices", "nodes"),
    [
        ("deepspeed --num_nodes 2 --num_gpus 4", 4, 2),
        ("nohup /opt/bin/deepspeed --hostfile all --num_gpus=2", 2, None),
        ("srun", None, None),
    ],
)
def test_flags_of_nodes_and_gpus_are_the_launchers(launcher: str, devices: int | None, nodes: int | None) -> None:
    trainer = settings_of(launched("", launcher))["trainer"]
    assert (trainer.get("devices"), trainer.get("num_nodes")) == (devices, nodes)


def test_flag_of_a_teacher_needs_its_switch() -> None:
    teacher = "--load-teacher /teachers/big --num-layers-teacher 24 --kd-alpha-ce 3 --kd-temp 2"
    assert "distiller" not in settings_of(launched(teacher))["model"]
    distilled = settings_of(launched(f"--mos {teacher}"))["model"]["distiller"]
    assert distilled["class_path"] == "nlgmoe.MixtureOfStudents"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--tensor-model-parallel-size 4", "--tensor-model-parallel-size 4: only 1 can be translated (there is no"),
        ("--mos --kd-beta-ce 1", "--load-teacher: is not given"),
        ("--lr-decay-iters 3", "--lr-decay-iters 3: is unknown; remove it, or skip"),
        ("--lr-decay-style linear", "--lr-decay-style linear: only cosine can be translated; change it"),
        ("--load other", "--load other: starts from another run's checkpoint"),
        ("--num-layers four", "--num-layers four: 'four' is not an integer; correct it"),
    ],
)
def test_refusals_name_the_flag_the_reason_and_the_remedy(flags: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        translated(launched(flags))
    assert message in str(error.value)
    assert len(set(str(error.value).splitlines())) == len(str(error.value).splitlines())
    assert re.match(r"[^\n]*(; ?[^\n]+|fit together)", str(error.value))


CURRICULUM = '{"curriculum_learning": {"enabled": true, "curriculum_type": "seqlen"}}'


def configured(flags: str, config: str, folder: Path) -> list[str]:
    (folder / "c.json").write_text(config)
    return launched(f"{flags} --deepspeed_config {folder / 'c.json'}")


def test_deepspeed_configuration_gives_loss_scale_clipping_and_offload(tmp_path: Path) -> None:
    config = """{"fp16": {"enabled": true, "initial_scale_power": 0, "hysteresis": null}, "gradient_clipping": 0.5,
     "curriculum_learning": {"enabled": false, "curriculum_type": "seqlen"},
     "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}"""
    trainer = settings_of(configured("--fp16 --hysteresis 2", config, tmp_path))["trainer"]
    made = trainer["strategy"]["init_args"]
    assert (made["initial_scale_power"], made["loss_scale_window"], made["hysteresis"]) == (0, 1000, 2)
    assert (trainer["gradient_clip_val"], made["stage"], made["offload_optimizer"]) == (0.5, 2, True)


@pytest.mark.parametrize(
    ("config", "flags", "message"),
    [
        (CURRICULUM, "", "has curriculum_learning, whose sequences grow by steps there and by tokens here; turn it"),
        ('{"fp16": {"enabled": true}}', "", "has fp16 on, and --fp16 does not say so; make them agree"),
        ('{"train_batch_size": 24}', "", "has train_batch_size=24, --global-batch-size is 8; make them agree"),
    ],
)
def test_the_deepspeed_configuration_must_agree_with_the_flags(
    config: str, flags: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError) as error:
        translated(configured(flags, config, tmp_path))
    assert message in str(error.value)
