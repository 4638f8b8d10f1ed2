"""`nlgmoe from-megatron`: translate flags of Megatron-DeepSpeed into a configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import quote

from nlgmoe.cli.output_files import check_output, write_whole
from nlgmoe.tools.megatron.arguments import Arguments
from nlgmoe.tools.megatron.launch import Launch, split_command
from nlgmoe.tools.megatron.run_script import run_script as run
from nlgmoe.tools.megatron.saved_arguments import read_checkpoint, read_log
from nlgmoe.tools.megatron.translate import translate
from nlgmoe.tools.megatron.yaml_text import yaml_text
from nlgmoe.validation import SettingError


def from_megatron(
    source: tuple[str, ...] = (),
    flags: list[str] | None = None,
    run_script: bool = False,
    output: str | None = None,
    variables: dict[str, str | int | float] | None = None,
    skip_unknown: bool = False,
) -> None:
    """Translate a launch of Megatron-DeepSpeed into YAML for `train.py fit --config`.

    Each flag becomes a setting, is listed in the header with the reason why it needs none, or is refused. Megatron's defaults
    are written as settings.

        nlgmoe from-megatron -- --num_gpus 8 --num-layers 24 ...
        nlgmoe from-megatron train.log
        nlgmoe from-megatron checkpoints/global_step1000
        nlgmoe from-megatron pretrain.sh --run-script

    Args:
        source: a log with the arguments that Megatron prints, a checkpoint's folder, or, with --run-script, a launch script.
        flags: Megatron's flags, or the whole command from deepspeed on; write them after a bare --, without --flags.
        run_script: run the script under bash in an empty temporary folder; echo, sed, grep and similar commands are run, others,
            such as deepspeed, are only recorded. This is not a sandbox: use it for scripts that you trust.
        output: file to write; default: standard output.
        variables: values of the script's variables, such as `--variables.NUM_GPUS 64`; they override its assignments.
        skip_unknown: list unknown flags in the header instead of refusing them.
    """
    if output is not None:
        check_output(output)
    given = {str(name): str(value) for name, value in (variables or {}).items()}
    text = translated(read_launch(source, flags or [], run_script, given), skip_unknown)
    if output is None:
        print(text, end="")
    else:
        write_whole(output, text)
        print(f"{output}: read what its comments say, then train with python train.py fit --config {quote(output)}")


def read_launch(
    source: Sequence[str], flags: Sequence[str], run_script: bool = False, variables: Mapping[str, str] | None = None
) -> Launch:
    """Read a launch from one of the four inputs; arguments and errors are those of `from_megatron`."""
    if len(source) + bool(flags) != 1:
        raise SettingError(
            "give one of these: a log, a checkpoint's folder, a launch script with --run-script, flags after --"
        )
    if variables and not run_script:
        raise SettingError("--variables are those of a script that is run; add --run-script, or leave them out")
    if flags:
        if run_script:
            raise SettingError("--run-script takes a script, not flags; leave it out")
        launcher, words = split_command(flags) or ([], list(flags))
        launch = Launch("the command line", "megatron", launcher, words)
    else:
        path = Path(source[0])
        if not path.exists():
            raise SettingError(
                f"{path} is not there; give a log, a checkpoint's folder, or a launch script with --run-script"
            )
        if run_script:
            if path.is_dir():
                raise SettingError(f"{path} is a folder; --run-script takes a script")
            return run(path, variables or {})
        launch = read_checkpoint(path) if path.is_dir() else read_log(path)
    launch.read_deepspeed_config(Path())
    if launch.deepspeed_config is not None:
        launch.notes.append(f"--deepspeed_config was read here, a relative path from {Path.cwd()}.")
    return launch


def translated(launch: Launch, skip_unknown: bool = False) -> str:
    """Translate a launch into YAML; errors are those of `from_megatron`."""
    arguments = Arguments(launch.flags, skip_unknown)
    translation = translate(launch, arguments)
    if arguments.problems:
        raise SettingError("\n".join(f"{launch.source}: {problem}" for problem in arguments.problems))
    return yaml_text(translation, launch.source)
