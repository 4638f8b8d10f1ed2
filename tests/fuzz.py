"""Hostile configurations, checkpoints, `.idx` files and YAML: `make fuzz`, or `python -m tests.fuzz --minutes 30 --seed 0`.

Every example runs in this process through the commands' own handler of errors. It has to end with exit code 0, or with an
exit code of `nlgmoe/cli/errors.py` and lines that begin with `error: `, without a traceback and without "unexpected". A
finding is printed with the example that shows it; fix its cause, and make the example a test of the suite.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import json
import logging
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from lightning import Trainer

from nlgmoe.cli.errors import one_line_errors
from nlgmoe.cli.parser import NAMED_BY_CLASS, is_section, parts_of
from nlgmoe.cli.train import main
from nlgmoe.commands import main as nlgmoe_command
from nlgmoe.data import MegatronIndexed, PileDataModule
from nlgmoe.data.indexed import HEADER
from nlgmoe.layers import routers
from nlgmoe.module import MoEGPTModule
from nlgmoe.non_finite import NonFiniteError
from tests.cli.test_errors import BASE, ROOT, Place, build_corpus

SECONDS = 60  # for an example, which takes one
DATA_BYTES = 6 << 30  # for this process: what asks for more is refused, here or by the project
ROUND = 40  # examples of a target before the next one's turn
# fmt: off
WILD: list[Any] = [
    *(0, -1, 7, 2**31, 2**63, 10**30, 1e-30, 0.3, 1e30, float("inf"), float("nan"), True, None, "", "x", "null", [], [1], {}),
    *("1_0", "0x10", "\x00", "é\u2028", {"a": 1}, {"class_path": "x"}, [[1]], [None], {"class_path": "torch.nn.Linear"}),
]
PLAUSIBLE: dict[str, list[Any]] = {  # where a number from 1 to 4 would be refused, or take long
    "vocab_size": [280, 300], "seq_len": [8, 16], "hidden_size": [8, 16], "num_experts": [2, 4, [2, 4], [0, 2]],
    "lr": [1e-3], "eps": [1e-8], "betas": [[0.9, 0.95], [0, 0]], "hidden_dropout": [0.0, 0.5], "init_std": [0.01],
    "attention_dropout": [0.0, 0.5], "layer_norm_eps": [1e-5], "start": [8], "decay_tokens": [None, 64], "min_lr": [0.0, 1e-4],
    "cooldown_tokens": [None, 32], "num_workers": [0], "counts": [None], "global_batch_size": [2, 4], "overfit_batches": [0],
    "max_epochs": [-1],
}
LEFT_OUT = {  # of more processes or devices, without an end, or an object in Python alone
    *("model.distiller", "model.warm_start", "model.compile", "data.corpus", "data.data_dir", "data.tokenizer", "data.seq_len"),
    *("accelerator", "strategy", "devices", "num_nodes", "logger", "callbacks", "plugins", "profiler", "default_root_dir"),
    *("max_steps", "max_time", "model_registry"),
}
PIECES = [
    *(b"", b"\x00", b"\xff", b"\t", b"\n", b"{", b"]", b": ", b"- ", b"&a ", b"*a", b"!!python/name:os.system ", b"? "),
    *(b"<<: ", b"\xef\xbb\xbf", b"'", b'"', b"|\n", b"---\n", b"...", b"%", b"@", b"~", b"\xe2\x80\xa8", b"[" * 2000),
]
# fmt: on


def leaves(name: str, hint: Any) -> Iterator[tuple[str, Any]]:
    """Yield the settings of a section with their types."""
    kinds = [kind for kind in parts_of(hint) if is_section(kind)]
    if not kinds:
        yield name, hint
    for kind in kinds:
        hints = get_type_hints(kind)
        for field in fields(kind):
            yield from leaves(f"{name}.{field.name}", hints[field.name])


def arguments(section: str, function: Any) -> Iterator[tuple[str, Any]]:
    """Yield the settings that a constructor takes."""
    hints = get_type_hints(function, vars(sys.modules[function.__module__]))
    for name in inspect.signature(function).parameters:
        if name in hints and not {name, f"{section}.{name}"} & LEFT_OUT:
            yield from leaves(f"{section}.{name}", hints[name])


def typed(hint: Any, name: str = "") -> st.SearchStrategy[Any]:
    """Draw a value of a type, small enough to train with."""
    if name in PLAUSIBLE:
        return st.sampled_from(PLAUSIBLE[name])
    if get_origin(hint) is Literal:
        return st.sampled_from(get_args(hint))
    if get_origin(hint) in (list, tuple):
        return st.tuples(*(typed(kind) for kind in get_args(hint))).map(list)
    if get_args(hint):
        return st.one_of([typed(kind) for kind in get_args(hint)])
    if hint in NAMED_BY_CLASS:
        return st.sampled_from(hint.__subclasses__() or [NoneType]).flatmap(part)
    known = {bool: st.booleans(), int: st.integers(1, 4), float: st.sampled_from([0.5, 1.0, 2.0]), str: st.just("norm")}
    return known.get(hint, st.none())


def part(kind: type) -> st.SearchStrategy[Any]:
    """Draw a router with some of its settings."""
    if not is_dataclass(kind):
        return st.none()
    hints = get_type_hints(kind)
    own = {field.name: typed(hints[field.name], field.name) | st.sampled_from(WILD) for field in fields(kind)}
    path = f"{kind.__module__}.{kind.__qualname__}"
    return st.fixed_dictionaries({}, optional=own).map(lambda args: {"class_path": path, "init_args": args})


SETTINGS = dict([*arguments("model", MoEGPTModule.__init__), *arguments("data", PileDataModule.__init__)])
SETTINGS |= dict(arguments("trainer", inspect.unwrap(Trainer.__init__)))
LONG = {"global_batch_size", "accumulate_grad_batches"}  # a large number is right, and takes for ever


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    """Draw a few settings, most of the type that they are for."""
    chosen = draw(st.lists(st.sampled_from(sorted(SETTINGS)), min_size=1, max_size=5, unique=True))
    found = {}
    for name in chosen:
        leaf = name.rpartition(".")[2]
        wild = leaf not in LONG and draw(st.integers(0, 7)) == 0
        found[name] = draw(st.sampled_from(WILD) if wild else typed(SETTINGS[name], leaf))
    return found


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *sections, leaf = name.split(".")
        inner = tree
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[leaf] = value
    return tree


class Slow(BaseException):
    """An example that takes too long."""


class Finding(Exception):
    """An example that ends otherwise than it should."""


def end_of(command: Callable[[list[str]], object], args: list[str], codes: tuple[int, ...], names: str = "") -> int:
    """Run a command and return its exit code.

    Raises:
        Finding: it ends with another exit code than 0 and `codes`, or without lines of ours that contain `names`.
    """
    said, code, cause = io.StringIO(), 0, None
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        try:
            command(args)
        except SystemExit as end:
            code, cause = end.code or 0, end.__cause__
        except Exception as error:
            raise Finding(f"{type(error).__name__} passes the handler: {error}") from error
    text = said.getvalue()
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    wrong = code not in (0, *codes) and not isinstance(cause, NonFiniteError)
    unclear = code and (not lines or not text.endswith(f"{lines[-1]}\n") or names not in text)
    if wrong or unclear or "Traceback" in text or any(len(line) > 700 or "NLGMOE_TRACEBACK" in line for line in lines):
        frames = traceback.extract_tb(cause.__traceback__) if cause is not None else []
        where = "".join(f" at {frame.filename}:{frame.lineno}" for frame in frames[-1:])
        raise Finding(f"exit code {code}{where}: {' | '.join(lines or text.splitlines()[-3:])}")
    return int(code)


class Targets:
    """What is fuzzed. Each method is a property; its examples' ends are counted by exit code."""

    def __init__(self, folder: Path) -> None:
        (folder / "run").mkdir()
        (folder / "run/base.yaml").write_text(BASE.replace("512", "300"))
        self.place = Place(folder / "run", build_corpus(folder / "corpus"), folder)
        main(self.place.args())
        self.whole = folder / "run/checkpoints/last.ckpt"
        prefix = folder / "indexed"
        text, tokenizer = folder / "corpus/text/prose.train.jsonl", folder / "corpus/tokenizer"
        nlgmoe_command.main(["prepare-data", f"--input={text}", f"--output={prefix}", f"--tokenizer={tokenizer}"])
        self.indexed = prefix

    example = ""  # what the last one consists of

    def scratch(self, name: str) -> Path:
        path = self.place.folder / name
        shutil.rmtree(path, ignore_errors=True)
        return path

    def configuration(self, data: st.DataObject) -> int:
        found, in_file = data.draw(configurations()), data.draw(st.booleans())
        self.scratch("again")
        self.example = f"{found} {'in a file' if in_file else 'as flags'}"
        args = self.place.args("--trainer.max_steps=2", f"--trainer.default_root_dir={self.place.folder / 'again'}")
        if in_file:
            args.insert(3, self.place.yaml(yaml.safe_dump(nested(found), allow_unicode=True)))
        else:
            args += [
                f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in found.items()
            ]
        return end_of(main, args, (2,))

    def yaml_bytes(self, data: st.DataObject) -> int:
        texts = [BASE.encode(), *(file.read_bytes() for file in sorted((ROOT / "configs").glob("*/laptop.yaml")))]
        text = bytearray(data.draw(st.sampled_from(texts)))
        for _ in range(data.draw(st.integers(1, 4))):
            start = data.draw(st.integers(0, len(text)))
            text[start : start + data.draw(st.integers(0, 8))] = data.draw(
                st.sampled_from(PIECES) | st.binary(max_size=4)
            )
        (self.place.folder / "bytes.yaml").write_bytes(text)
        self.example = repr(bytes(text))
        return end_of(main, self.place.args(f"--config={self.place.folder}/bytes.yaml", "--print_config"), (2,))

    def checkpoint(self, data: st.DataObject) -> int:
        copy = self.scratch("broken.ckpt")
        shutil.copytree(self.whole, copy)
        files = sorted(file.name for file in copy.iterdir())
        kind = data.draw(st.sampled_from(["flip", "cut", "remove"]))
        file = copy / data.draw(st.sampled_from(files))
        content = bytearray(file.read_bytes())
        at = min(data.draw(st.integers(0, len(content) - 1) | st.integers(0, 400)), len(content) - 1)
        content[at : at + 1] = bytes([content[at] ^ 1 << data.draw(st.integers(0, 7))])
        file.write_bytes(content if kind == "flip" else content[:at])
        if kind == "remove":
            file.unlink()
        self.example = f"{kind} {file.name} at {at}"
        run, out, ckpt = self.place, self.scratch("again"), f"--ckpt_path={copy}"
        self.scratch("exported")
        root = f"--trainer.default_root_dir={out}"
        readers: dict[str, tuple[Any, list[str]]] = {
            "verify": (nlgmoe_command.main, ["verify", str(copy)]),
            "generate": (nlgmoe_command.main, ["generate", str(copy), "--prompt=cat", "--max_new_tokens=1"]),
            "export": (nlgmoe_command.main, ["export", str(copy), str(run.folder / "exported")]),
            "validate": (main, run.args(ckpt, root, command="validate")),
            "fit": (main, run.args(ckpt, root, "--model.train_tokens=128")),
            "warm_start": (main, run.args(f"--model.warm_start.checkpoint={copy}", root)),
        }
        reader = data.draw(st.sampled_from(sorted(readers)))
        command, args = readers[reader]
        self.example += f", read by {reader}"
        return end_of(command, [arg.replace("512", "300") for arg in args], (1, 2), "broken.ckpt")

    def idx(self, data: st.DataObject) -> int:
        prefix = self.place.folder / "broken"
        for ending in (".idx", ".bin"):
            shutil.copy(f"{self.indexed}{ending}", f"{prefix}{ending}")
        file = Path(f"{prefix}{data.draw(st.sampled_from(['.idx', '.idx', '.bin']))}")
        content, self.example = bytearray(file.read_bytes()), file.name
        for _ in range(data.draw(st.integers(1, 3))):
            at = data.draw(st.integers(0, len(content)) | st.integers(0, HEADER.size))
            new = data.draw(
                st.binary(max_size=8)
                | st.integers(-(2**63), 2**63 - 1).map(lambda n: n.to_bytes(8, "little", signed=True))
            )
            length = data.draw(st.just(len(new)) | st.integers(0, 40))
            content[at : at + length] = new
            self.example += f" [{at}:{at + length}] = {new!r}"
        file.write_bytes(content)

        def read(_: list[str]) -> None:
            with one_line_errors():
                corpus = MegatronIndexed(str(prefix), (80, 20, 0))
                corpus.open(self.place.corpus, str(self.place.corpus / "tokenizer")).training_source(8, 1).sample(0)

        return end_of(read, [], (1,), "broken")


def campaign(minutes: float, first_seed: int) -> int:
    """Run the targets in turn; return the number of findings."""
    assert routers.__doc__  # imported: a router of it is a subclass
    resource.setrlimit(resource.RLIMIT_DATA, (DATA_BYTES, resource.RLIM_INFINITY))
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)

    def too_slow(*_: object) -> None:
        raise Slow

    signal.signal(signal.SIGALRM, too_slow)
    found: dict[str, tuple[str, str]] = {}
    counts: Counter[str] = Counter()
    end, number = time.monotonic() + 60 * minutes, first_seed * 10_000
    with tempfile.TemporaryDirectory() as folder:
        targets = Targets(Path(folder))
        properties = [targets.configuration, targets.checkpoint, targets.idx, targets.yaml_bytes]
        while time.monotonic() < end:
            for target in properties:
                _round(targets, target, number, found, counts)
            number += 1
    print(
        f"seeds {first_seed * 10_000} to {number - 1}; "
        + ", ".join(f"{name}: {counts[name]}" for name in sorted(counts))
    )
    for line, example in found.values():
        print(f"\nFINDING {line}\n  {example}")
    print(f"\n{len(found)} findings")
    return len(found)


def _round(targets: Targets, target: Any, number: int, found: dict[str, tuple[str, str]], counts: Counter[str]) -> None:
    @seed(number)
    @settings(
        max_examples=ROUND,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        signal.alarm(SECONDS)
        try:
            code = target(data)
            counts[f"{target.__name__} exit {code}"] += 1
        except (Finding, Slow) as error:
            line = f"{target.__name__}: {error or f'more than {SECONDS} s'}"
            key, example = re.sub(r"[\d.]+|/\S+", "N", line)[:120], targets.example
            if key not in found:
                print(f"seed {number} {line}\n  {example}", flush=True)
            if key not in found or len(example) < len(found[key][1]):
                found[key] = line, example
        finally:
            signal.alarm(0)

    check()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    given_args = parser.parse_args()
    sys.exit(1 if campaign(given_args.minutes, given_args.seed) else 0)
