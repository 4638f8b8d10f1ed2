"""Translate a launch into our settings, each with a comment for its line in the YAML.

Settings that take one flag's value as it is come from the table in `flags.py`; the others are derived in
`model_settings.py`, `training_settings.py` and `run_settings.py`.
"""

from __future__ import annotations

from typing import Any

from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.optim.param_groups import AdamWConfig
from nlgmoe.optim.token_schedule import LearningRateSchedule, SequenceCurriculum
from nlgmoe.tools.megatron.arguments import Arguments
from nlgmoe.tools.megatron.flags import FLAGS, SECTIONS
from nlgmoe.tools.megatron.job import Job, Translation
from nlgmoe.tools.megatron.launch import Launch
from nlgmoe.tools.megatron.model_settings import model_settings
from nlgmoe.tools.megatron.run_settings import run_settings
from nlgmoe.tools.megatron.training_settings import data_settings, length_settings, optimisation_settings


def translate(launch: Launch, arguments: Arguments) -> Translation:
    """Translate a launch; add what cannot be translated to `arguments.problems`.

    Args:
        launch: the launch.
        arguments: its flags.
    """
    job = Job(launch, arguments)
    model_settings(job)
    optimisation_settings(job)
    length_settings(job)
    data_settings(job)
    run_settings(job)
    _note_flags_without_setting(job)
    if not arguments.problems:
        _check_together(job)
    return job.result


def _note_flags_without_setting(job: Job) -> None:
    reasons: dict[str, list[str]] = {}
    for use in job.arguments.uses.values():
        if use.row.kind == "ignored":
            reasons.setdefault(use.row.note, []).append(use.flag.name)
    dense = [name for name in job.arguments.uses if FLAGS[name][1] in SECTIONS["Experts"] and name != "--num-experts"]
    if dense and not job.is_moe:
        reasons["no effect: the model is dense"] = dense
    idle = [name for name in job.arguments.uses if FLAGS[name][1] in SECTIONS["Distillation"]]
    if idle and not job.has_teacher:
        reasons["no effect without --mos or --kd"] = idle
    if job.arguments.has("--save") and job.arguments.has("--tensorboard-dir"):
        reasons["logs go into trainer.default_root_dir"] = ["--tensorboard-dir"]
    job.result.notes += [f"{', '.join(names)}: {reason}." for reason, names in reasons.items()]
    if job.arguments.skipped:
        job.result.notes.append(f"NOT TRANSLATED, unknown: {', '.join(job.arguments.skipped)}.")


def _check_together(job: Job) -> None:
    """Run the checks of our configuration classes on the settings."""
    tree: dict[str, Any] = {}
    for path, value in job.result.settings.items():
        *parents, leaf = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    model = tree["model"]
    moe = model["config"].pop("moe")
    try:
        GPTConfig(**model["config"], moe=MoEConfig(**moe) if moe else None)
        AdamWConfig(**model["optimizer"])
        LearningRateSchedule(**model["schedule"])
        if "curriculum" in model:
            SequenceCurriculum(**model["curriculum"])
    except ValueError as error:
        job.arguments.problem("the launch", f"does not fit together: {error}")
