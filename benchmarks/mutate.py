"""Mutation campaign: how many small faults of the package does the suite notice?

    python -m benchmarks.mutate                                     # a seeded sample of 200 mutants over PARTS
    python -m benchmarks.mutate --all nlgmoe/layers/router.py ...   # every mutant of these files
    python -m benchmarks.mutate --survivors ...                     # those that survived, again

A mutant is one change of one file. In a copy of the tracked files, it is run against the test files that import its module:
those in its folder or that killed others of its file, then the rest by the number of imports between, cheap ones first; until a
test fails, a file takes far longer than without the mutant, or `--seconds` are spent. Each file runs in a process forked from
one that has imported the libraries alone.

docs/results/mutants.json has the results; a mutant that is there is not run again. benchmarks/equivalent_mutants.yaml has the
mutants that no test can notice, with the reason.
"""

from __future__ import annotations

import argparse
import ast
import copy
import difflib
import gc
import hashlib
import importlib
import itertools
import json
import multiprocessing.forkserver
import multiprocessing.util
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import types
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs/results/mutants.json"
EQUIVALENT = ROOT / "benchmarks/equivalent_mutants.yaml"
PARTS = ("layers/", "module.py", "distill/", "parallel/", "checkpoint/", "optim/", "data/")
LIBRARIES = ("torch", "lightning", "deepspeed", "datasets", "transformers", "jsonargparse", "scipy.stats", "hypothesis")

OPERATORS: dict[type, type] = {
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq},
    **{ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And},
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult},
    **{ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd},
}
FIRST_TIME = 60.0  # seconds of CPU time that a test file may take before its time is known; five times as many may pass
SPAWN = multiprocessing.util.spawnv_passfds
ORDERED = (ast.Lt, ast.LtE, ast.Gt, ast.GtE)
PAIRS = ("min max", "any all", "argmin argmax", "clamp_min clamp_max", "floor ceil", "zeros ones", "sum mean")
NAMES = {a: b for pair in PAIRS for a, b in itertools.permutations(pair.split())}
UNSWAPPED = {"min", "max", "promote_types", "isinstance", "getattr", "hasattr", "cast"}  # the same, or never run
SKIPPED = {"annotation", "returns", "decorator_list", "msg", "exc", "cause", "bases"}  # fields: types and messages


@dataclass(frozen=True)
class Mutant:
    """One change: its file, line and source, and the lines before and after it."""

    file: str
    line: int
    source: str
    change: str

    @property
    def key(self) -> str:
        """Name in the results, which stays when other lines of the file change."""
        return f"{self.file}: {self.change}"


def mutants(file: str, source: str) -> Iterator[Mutant]:
    """Yield all mutants of a source file, without its comments."""
    tree = ast.parse(source)
    before = ast.unparse(tree).splitlines()
    seen: Counter[str] = Counter()
    for holder, field, index, new, line in list(_changes(tree)):
        fields, place = (vars(holder), field) if index is None else (getattr(holder, field), index)
        old, fields[place] = fields[place], new
        text = ast.unparse(tree)
        fields[place] = old
        diff = list(difflib.unified_diff(before, text.splitlines(), n=0))[2:]
        change = "\n".join(f"{each[0]} {each[1:].strip()}" for each in diff if each[0] in "-+")
        seen[change] += 1
        yield Mutant(file, line, text + "\n", change + (f" #{seen[change]}" if seen[change] > 1 else ""))


def _changes(node: ast.AST, line: int = 0) -> Iterator[tuple[ast.AST, str, Any, ast.AST, int]]:
    """Yield each node of which a field changes, the field, the index in it or None, the new value, and the line."""
    for field, value in ast.iter_fields(node):
        for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if field in SKIPPED or not isinstance(child, ast.AST) or isinstance(child, ast.JoinedStr):
                continue
            line = getattr(child, "lineno", line)
            for new in _replacements(child):
                yield node, field, index, new, line
            negated = isinstance(child, ast.UnaryOp) or (
                isinstance(child, ast.Compare) and not isinstance(child.ops[0], ORDERED)
            )  # by another operator
            if field in ("test", "ifs") and not isinstance(node, ast.Assert) and not negated:
                yield node, field, index, ast.UnaryOp(ast.Not(), child), line
            yield from _changes(child, line)


def _replacements(node: ast.AST) -> Iterator[ast.AST]:
    """Yield what may stand in place of a node."""
    if (operator := OPERATORS.get(type(node))) is not None:
        yield operator()
    match node:
        case ast.Constant(value=bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(value=int(value) | float(value)):
            yield from (ast.Constant(value + step) for step in (1, -1))
        case ast.UnaryOp(operand=operand) if not isinstance(operand, ast.Constant):
            yield operand
        case ast.Return(value=ast.expr() as value) if ast.unparse(value) != "None":
            yield ast.Return(ast.Constant(None))
        case ast.Raise() | ast.AugAssign() | ast.Break() | ast.Continue() | ast.Expr(value=ast.Call() | ast.Yield()):
            yield ast.Pass()
        case ast.Assign(targets=[ast.Name(id=name)], value=value):  # without it, the name has an older value
            if any(isinstance(part, ast.Name) and part.id == name for part in ast.walk(value)):
                yield ast.Pass()
        case ast.Assign():
            yield ast.Pass()
        case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name), args=args):
            if name in NAMES:
                new = copy.deepcopy(node)
                setattr(new.func, "id" if isinstance(new.func, ast.Name) else "attr", NAMES[name])
                yield new
            plain = len(args) > 1 and not any(isinstance(arg, ast.Starred | ast.JoinedStr) for arg in args[-2:])
            if plain and name not in UNSWAPPED and ast.dump(args[-1]) != ast.dump(args[-2]):
                yield ast.Call(node.func, [*args[:-2], args[-1], args[-2]], node.keywords)


def rank(mutant: Mutant, seed: int) -> str:
    """Return a random place in the order of mutants, which does not change with other mutants."""
    return hashlib.sha256(f"{seed} {mutant.key}".encode()).hexdigest()


def sample(parts: Iterable[list[Mutant]], number: int, seed: int) -> list[Mutant]:
    """Draw `number` mutants, from each part in proportion, at least 5."""
    parts = [sorted(part, key=lambda mutant: rank(mutant, seed)) for part in parts]
    share = number / sum(map(len, parts))
    return list(itertools.chain(*(part[: max(5, round(share * len(part)))] for part in parts)))


class Importers:
    """Which test files import a module, as their sources say."""

    def __init__(self, root: Path) -> None:
        paths = [path.relative_to(root) for part in ("nlgmoe", "tests") for path in (root / part).rglob("*.py")]
        modules = {self._module(path): path for path in paths}
        self._imports = {name: self._names(root / path) & modules.keys() - {name} for name, path in modules.items()}
        self._tests = {name: str(path) for name, path in modules.items() if path.name.startswith("test_")}

    @staticmethod
    def _module(path: Path) -> str:
        return ".".join(path.with_suffix("").parts).removesuffix(".__init__")

    @staticmethod
    def _names(file: Path) -> set[str]:
        found = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):  # class paths, tables of lazy imports
                found |= {node.value, node.value.rpartition(".")[0]}
        return found

    def of(self, file: str) -> dict[str, int]:
        """Return the test files that import it, and by how many steps."""
        new, steps = {self._module(Path(file))}, dict[str, int]()
        for step in range(len(self._imports)):
            steps |= dict.fromkeys(new, step)
            new = {name for name, imports in self._imports.items() if imports & new} - steps.keys()
        return {path: steps[name] for name, path in self._tests.items() if name in steps}


class Tree:
    """A copy of a repository that mutants run in.

    Args:
        root: of the repository.
        files: to copy.
        folder: of the copy.
        seconds: test file -> its CPU time without a mutant; None if it fails then. Is added to.
    """

    def __init__(self, root: Path, files: Iterable[str], folder: Path, seconds: dict[str, float | None]) -> None:
        self.root, self.folder, self.seconds, self.kills = root, folder, seconds, Counter[tuple[str, str]]()
        self._importers = Importers(root)
        for file in files:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / file, folder / file, follow_symlinks=False)
        (folder / "data").symlink_to((root / "data").resolve())
        self._times = itertools.count(10**9)  # Python compares a source's time, in seconds, with that in its .pyc

    def killer(self, mutant: Mutant, budget: float) -> str | None:
        """Return the first test that fails with the mutant; None: it survives tests worth `budget` seconds."""
        steps, module = self._importers.of(mutant.file), Path(mutant.file)

        def place(file: str) -> tuple[int, float]:
            kills, test = self.kills[mutant.file, file], Path(file)
            near = kills or test.stem.removeprefix("test_") == module.stem or test.parent.name == module.parent.name
            return 0 if near else steps[file], (self.seconds.get(file, 0) or 0) / (1 + kills)

        files = []
        for file in sorted(steps, key=place):
            if file not in self.seconds and budget > 5 * steps[file]:  # to measure a distant one is worth less
                failed, elapsed = self._run([file], 5 * FIRST_TIME)
                self.seconds[file] = (
                    FIRST_TIME if "timeout" in (failed or "") else None if failed else round(elapsed, 1)
                )
            if (cost := self.seconds.get(file)) and cost <= budget:
                files.append(file)
                budget -= cost
        original = (self.folder / mutant.file).read_text()
        self._write(mutant.file, mutant.source)
        try:
            for some in filter(
                None, (files[:1], files[1:])
            ):  # the likeliest alone: to collect the others takes its time
                if failed := self._run(some, FIRST_TIME + 10 * sum(self.seconds[file] or 0 for file in some))[0]:
                    self.kills[mutant.file, failed.partition(":")[0]] += 1
                    return failed
            return None
        finally:
            self._write(mutant.file, original)

    def _write(self, file: str, source: str) -> None:
        (self.folder / file).write_text(source)
        os.utime(self.folder / file, (moment := next(self._times), moment))

    def _run(self, files: list[str], limit: float) -> tuple[str | None, float]:
        """Run test files in a forked process; returns the test that fails, or what else is wrong; and seconds of CPU time."""
        with tempfile.TemporaryFile("w+") as told:
            child = os.fork()
            if child == 0:
                try:
                    os._exit(self._pytest(files, told))
                except BaseException:
                    os._exit(pytest.ExitCode.INTERNAL_ERROR)
            ended = select.select([descriptor := os.pidfd_open(child)], [], [], limit)[0]
            os.close(descriptor)
            with suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)  # and what it has started
            _, status, used = os.wait4(child, 0)
            code = os.waitstatus_to_exitcode(status)
            told.seek(0)
            failed = told.read() or (f"{files[0]}: exit code {code}" if ended else f"{files[0]}: timeout")
        passed = ended and code in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
        return None if passed else failed, used.ru_utime + used.ru_stime

    def _pytest(self, files: list[str], told: Any) -> int:
        os.setsid()
        for stream in (0, 1, 2):
            os.dup2(os.open(os.devnull, os.O_RDWR), stream)
        os.chdir(self.folder)
        paths = [str(self.folder), str(self.folder / "docs/examples")]
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)
        sys.path[:] = paths + [path for path in sys.path if "site-packages" in path or path.startswith(sys.base_prefix)]
        sys.modules["__main__"] = types.ModuleType("__main__")  # processes of tests would import this file
        for name in [name for name in sys.modules if name.partition(".")[0] in ("benchmarks", "tests", "nlgmoe")]:
            del sys.modules[name]
        multiprocessing.util.spawnv_passfds = _fork_server
        multiprocessing.forkserver._forkserver._forkserver_pid = None  # type: ignore[attr-defined]  # the parent's

        class FirstFailure:
            def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
                if report.failed:
                    told.write(report.nodeid)
                    told.flush()

        code = int(pytest.main(["-x", "-n", "0", "--tb=no", "-p", "no:cacheprovider", *files], [FirstFailure()]))
        if (server := multiprocessing.forkserver._forkserver._forkserver_pid) is not None:  # type: ignore[attr-defined]
            os.kill(server, signal.SIGKILL)
            os.waitpid(server, 0)  # so that its CPU time counts
        return code


def _fork_server(path: bytes, args: list[str], descriptors: list[int]) -> int:
    """Fork what would be a new interpreter, multiprocessing's server: it would import the libraries again."""
    if "forkserver" not in args[-1]:
        return SPAWN(path, args, descriptors)
    if (child := os.fork()) == 0:
        weakref.finalize._registry.clear()  # type: ignore[attr-defined]  # temporary folders are the parent's to remove
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__  # pytest has replaced them
        try:
            exec(args[-1], {})
        finally:
            os._exit(0)
    return child


def score(killed: int, number: int) -> dict[str, Any]:
    """Share of mutants that are killed, and its Wilson interval at 95%."""
    from scipy.stats import binomtest

    low, high = binomtest(killed, number).proportion_ci(method="wilson")
    return {"killed": killed, "score": round(killed / number, 3), "interval": [round(low, 3), round(high, 3)]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", nargs="+", metavar="FILE", help="every mutant of these files")
    parser.add_argument("--survivors", action="store_true", help="run those again that survived")
    parser.add_argument("--number", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=60, help="CPU time of the tests that a mutant has to survive")
    parser.add_argument("--minutes", type=float, default=1e9, help="to stop after; the same command resumes")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"

    git = ["git", "-C", str(ROOT)]
    commit = subprocess.check_output([*git, "rev-parse", "--short", "HEAD"], text=True).strip()
    tracked = subprocess.check_output([*git, "ls-files"], text=True).splitlines()

    def of(start: str) -> list[Mutant]:
        files = [file for file in tracked if file.startswith(start) and file.endswith(".py")]
        return [mutant for file in files for mutant in mutants(file, (ROOT / file).read_text())]

    if options.all:
        groups = {file: of(file) for file in options.all}
    else:
        drawn = sample([of(f"nlgmoe/{part}") for part in PARTS], options.number, options.seed)
        groups = {f"sample of {options.number}, seed {options.seed}": drawn}
    # In an order that makes any beginning a sample.
    chosen = sorted(itertools.chain(*groups.values()), key=lambda mutant: rank(mutant, options.seed))
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    found, scores = results.setdefault("mutants", {}), results.setdefault("scores", {})
    equivalent = {f"{known['file']}: {known['change']}" for known in yaml.safe_load(EQUIVALENT.read_text())}

    def save() -> None:
        for name, group in groups.items():
            keys = {mutant.key for mutant in group} - equivalent
            run = [found[key] for key in keys & found.keys()]
            killed = sum(bool(result["killed_by"]) for result in run)
            if run:
                counts = {"mutants": len(group), "equivalent": len(group) - len(keys), "run": len(run)}
                scores[name] = {**counts, **score(killed, len(run)), "commit": commit}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")

    def alive(mutant: Mutant) -> bool:
        return mutant.key in found and not found[mutant.key]["killed_by"] and mutant.key not in equivalent

    for library in LIBRARIES:
        importlib.import_module(library)
    end = time.monotonic() + 60 * options.minutes
    folder = Path(
        tempfile.mkdtemp()
    )  # `TemporaryDirectory` would be removed by a forked process that runs exit functions
    folder.chmod(0o755)  # tests that act as another user import from it
    try:
        pytest.main(["-q", "-p", "no:cacheprovider", "-c", os.devnull, str(folder)])  # imports its plugins
        gc.freeze()
        # A file that failed without a mutant is tried again.
        known = {file: seconds for file, seconds in results.get("seconds", {}).items() if seconds is not None}
        results["seconds"] = known
        tree = Tree(ROOT, tracked, folder, known)
        for key, result in found.items():
            if result["killed_by"]:
                tree.kills[key.partition(":")[0], result["killed_by"].partition(":")[0]] += 1
        for mutant in chosen:
            again = options.survivors and alive(mutant)
            if time.monotonic() > end or (mutant.key in found and not again) or mutant.key in equivalent:
                continue
            killer = tree.killer(mutant, options.seconds)
            found[mutant.key] = {"line": mutant.line, "killed_by": killer, "commit": commit}
            save()
            print(f"{mutant.file}:{mutant.line}: {killer or 'SURVIVED'}\n{mutant.change}", flush=True)
    finally:
        shutil.rmtree(folder)
    save()
    for mutant in filter(alive, chosen):
        print(f"\n{mutant.file}:{mutant.line}\n{mutant.change}")
    print(json.dumps(scores, indent=1))


if __name__ == "__main__":
    main()
