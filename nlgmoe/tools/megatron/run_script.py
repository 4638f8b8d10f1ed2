"""A launch script, run under bash in a folder of its own with its commands recorded -> the command that it launches.

`prelude.sh` makes the recorders. This is no sandbox: a script that sets out to escape can.
"""

from __future__ import annotations

import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from nlgmoe.tools.megatron.launch import Launch, split_command
from nlgmoe.validation import RunError, SettingError

TIME_LIMIT = 60.0  # seconds
_PRELUDE = Path(__file__).with_name("prelude.sh")
# Put into PATH, and those that may write, but only inside the script's folder.
_HARMLESS = (
    *(
        "awk",
        "basename",
        "bash",
        "bc",
        "cat",
        "cut",
        "date",
        "dirname",
        "expr",
        "grep",
        "egrep",
        "head",
        "jq",
        "ls",
        "readlink",
    ),
    *("realpath", "rev", "seq", "sort", "tac", "tail", "tr", "uniq", "wc"),
)
_GUARDED = ("cp", "mkdir", "mktemp", "realpath", "sed", "tee", "touch")
_COUNTED = ("NUM_GPUS", "NUM_GPUS_PERNODE")  # variables that are read at the launch, used in the script or not
_SUBSTITUTION = re.compile(r"s([/|#,])(.*?)\1(.*)\1[gI]*")
_REFERENCE = re.compile(
    r"(?<!\\)\$(?:\{#?(?=\w+(?!:?[-+=?])[}\[:/%#]))?([A-Za-z_]\w*)"
)  # to a variable, without a default
_MISSING = re.compile(r"(?:.*: )?(?:can't read )?(.+): No such file or directory")  # a line on stderr
_ANNOUNCEMENT = """\
{name} runs under bash in an empty temporary folder with copies of the .sh and .json files beside it, without input, for at
most {limit:.0f} s. Commands other than bash's own and tools for text (cat, sed, grep, ...) are recorded, not run. This is no
sandbox (output can be redirected to any file): run scripts that you trust."""


@dataclass(frozen=True)
class _Record:
    """A command that was recorded.

    Attributes:
        words: the command.
        captured: its output went into a pipe or a substitution.
        variables: those that count GPUs or hold the ZeRO stage.
        names: of all variables that were set.
    """

    words: list[str]
    captured: bool
    variables: dict[str, str]
    names: set[str]


def run_script(script: Path, variables: Mapping[str, str]) -> Launch:
    """Run a script and return what it launches.

    Args:
        script: the script.
        variables: set before each of its commands, so that they win over its own assignments.
    """
    source = script.read_text(encoding="utf-8", errors="replace")
    for name in variables:
        if name not in _COUNTED and not re.search(rf"\b{re.escape(name)}\b", source):
            raise SettingError(f"there is no variable {name} in {script.name}; check the name given with --variables")
    bash = shutil.which("bash")
    if bash is None:
        raise RunError("--run-script needs bash, which is not in PATH; install it, or give the flags after --")
    print(_ANNOUNCEMENT.format(name=script.name, limit=TIME_LIMIT), file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="from-megatron-") as temporary:
        root = Path(temporary).resolve()
        work = root / "work"
        _prepare(root, work, script)
        status = _run([bash, "--noprofile", "--norc", script.name], work, _environment(root, work, variables))
        records = [
            _read_record(file, work) for file in sorted(root.glob("records/*"), key=lambda f: f.stat().st_mtime_ns)
        ]
        if status == 99 and not records:
            raise RunError(f"--run-script needs bash 4.4 or newer, {bash} is older; give the flags after --")
        return _launch(script, records, work, (root / "stderr").read_text(errors="replace"))


def _prepare(root: Path, work: Path, script: Path) -> None:
    for folder in (work, root / "records"):
        folder.mkdir()
    for kind, names in (("bin", _HARMLESS), ("guarded", _GUARDED)):
        (root / kind).mkdir()
        for name in names:
            if found := shutil.which(name):
                (root / kind / name).symlink_to(found)
    for file in [script, *script.parent.glob("*.sh"), *script.parent.glob("*.json")]:
        if file.is_file() and not (work / file.name).exists():
            shutil.copy2(file, work)


def _environment(root: Path, work: Path, variables: Mapping[str, str]) -> dict[str, str]:
    return {
        **variables,
        "HOME": str(work),
        "HOSTNAME": "localhost",
        "PATH": str(root / "bin"),
        "LC_ALL": "C",
        "BASH_ENV": str(_PRELUDE),
        "FROM_MEGATRON": str(root),
        "FROM_MEGATRON_VARIABLES": "\n".join(f"{name}={shlex.quote(value)}" for name, value in variables.items()),
    }


def _run(command: Sequence[str], work: Path, environment: Mapping[str, str]) -> int:
    """Run until all processes have ended, those in the background too."""
    alive, inherited = os.pipe()  # every process has the writing end: when none is left, the reading end is at its end
    with (work.parent / "stderr").open("wb") as errors:
        process = subprocess.Popen(
            command,
            cwd=work,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            pass_fds=(inherited,),
            start_new_session=True,
        )
    os.close(inherited)
    try:
        if not select.select([alive], [], [], TIME_LIMIT)[0]:
            raise RunError(f"the script ran longer than {TIME_LIMIT:.0f} s and was ended; give the flags after --")
    finally:
        os.close(alive)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # those in the background outlive bash
        process.wait()
    return process.returncode


def _read_record(file: Path, work: Path) -> _Record:
    fields = file.read_bytes().decode(errors="replace").replace(str(work), ".").split("\0")[:-1]
    captured, gpus, per_node, stage, names, *words = fields
    variables = {"NUM_GPUS": gpus, "NUM_GPUS_PERNODE": per_node, "ZERO_STAGE": stage}
    return _Record(words, bool(captured), variables, set(names.split()))


def _launch(script: Path, records: Sequence[_Record], work: Path, errors: str) -> Launch:
    launches = [(split, one) for one in records if (split := split_command(one.words))]
    if not launches:
        _refuse_nothing(script, errors)
    if any(split != launches[0][0] for split, _ in launches):
        raise SettingError(
            f"{script.name}: launches pretrain_gpt.py {len(launches)} times, with other flags; keep one launch"
        )
    (launcher, flags), record = launches[0]
    launch = Launch(script.name, script.stem, launcher, flags, record.variables)
    launch.read_deepspeed_config(work)
    for one in records:
        if one.words[0] == "sed":
            found = [match for word in one.words[1:] if (match := _SUBSTITUTION.fullmatch(word))]
            launch.substitutions |= {match[2]: match[3] for match in found}
    code = re.sub(r"^\s*#.*", "", script.read_text(encoding="utf-8", errors="replace"), flags=re.MULTILINE)
    unset = {name for name in _REFERENCE.findall(code) if not re.search(rf"\b{name}(\+?=|\s+in\b)", code)}
    empty = sorted(f"${name}" for name in unset - record.names)
    empty += dict.fromkeys(f"the output of {one.words[0]}" for one in records if one.captured and one.words[0] != "sed")
    if empty:
        launch.notes.append(f"Empty in this run: {', '.join(empty)}. Give values with --variables.NAME VALUE.")
    unread = {one.words[1] for one in records if one.words[0] == "source" and any(one.words[1:2])}
    unread |= {match[1].replace(str(work), ".") for line in errors.splitlines() if (match := _MISSING.fullmatch(line))}
    if unread := unread - {"''"}:
        launch.notes.append(
            f"Not read in this run: {', '.join(sorted(unread))}. Put what the script needs beside it, as a .sh or .json file."
        )
    for note in launch.notes:
        print(f"{script.name}: {note}", file=sys.stderr)
    return launch


def _refuse_nothing(script: Path, errors: str) -> NoReturn:
    last = errors.strip().rpartition("\n")[2]
    said = f" (bash: {last})" if last else ""
    raise SettingError(
        f"{script.name}: nothing launches pretrain_gpt.py{said}; give the script that calls it, such as through deepspeed"
    )
