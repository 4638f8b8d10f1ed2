"""`nlgmoe from-megatron`: a Megatron-DeepSpeed launch script as one of our configurations."""

from __future__ import annotations

from pathlib import Path

from nlgmoe.cli.errors import UsageError, UsageErrors
from nlgmoe.tools.megatron.arguments import Arguments, Problem
from nlgmoe.tools.megatron.script import read_launch
from nlgmoe.tools.megatron.tokens import ScriptError
from nlgmoe.tools.megatron.translate import translate
from nlgmoe.tools.megatron.yaml_text import yaml_text


def from_megatron(
    script: str,
    output: str | None = None,
    variables: dict[str, str | int | float] | None = None,
    skip_unknown: bool = False,
) -> None:
    """Translate a Megatron-DeepSpeed launch script into YAML for `train.py fit --config`.

    The script is parsed, never run. Every flag becomes a setting, or is named in the header with the reason why it needs
    none, or stops the translation; settings that the script leaves to Megatron's defaults are written out.

    Args:
        script: the shell script that launches pretrain_gpt.py.
        output: file to write; the standard output if it is not given.
        variables: values for what the text does not tell, such as `--variables.NUM_GPUS 64` where the script counts them.
        skip_unknown: name flags that are in no table in the header instead of refusing them.

    Raises:
        ValueError: something is not understood or not possible here; one line for each, with the remedy.
    """
    path = Path(script)
    if not path.is_file():
        raise UsageError(f"script={script} is not there; give the shell script that launches pretrain_gpt.py")
    text = translated(path, {name: str(value) for name, value in (variables or {}).items()}, skip_unknown)
    if output is None:
        print(text, end="")
    else:
        if Path(output).exists():
            raise UsageError(f"output={output} exists already; name another file, or delete it")
        Path(output).write_text(text)
        print(f"{output}: read what its comments say, then train with python train.py fit --config {output}")


def translated(path: Path, variables: dict[str, str], skip_unknown: bool = False) -> str:
    """The YAML for a script; arguments and errors are those of `from_megatron`."""
    source = path.read_text()
    try:
        launch, expander = read_launch(source, variables)
        arguments = Arguments(launch, expander, skip_unknown)
        translation = translate(launch, arguments, path.stem)
    except ScriptError as error:
        raise UsageError(f"{path.name}:{error.line}: {error}") from error
    if arguments.problems:
        raise UsageErrors([_one_line(path, problem) for problem in sorted(arguments.problems, key=_line)])
    return yaml_text(translation, path.name)


def _one_line(path: Path, problem: Problem) -> str:
    return f"{path.name}:{problem.line}: {problem.subject}: {problem.message}"


def _line(problem: Problem) -> int:
    return problem.line
