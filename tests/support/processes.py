"""Processes of tests, forked from one that has imported torch, Lightning, DeepSpeed and nlgmoe, which takes 8 s of CPU time."""

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[2]
FORKED = multiprocessing.get_context("forkserver")  # `tests/conftest.py` has it import `tests/support/preloaded.py`


class Started:
    """`python ARGS` in a forked process, with the part of `subprocess.Popen`'s interface that tests use.

    Args:
        args: a script or `-m MODULE`, then its arguments; or `-c CODE`.
        output: file of its standard output.
        errors: file of its standard error.
        env: environment; as here if None.
        cwd: folder to start in.
        new_session: as `Popen`'s `start_new_session`.
    """

    def __init__(
        self,
        args: Sequence[str],
        output: Path,
        errors: Path,
        env: Mapping[str, str] | None = None,
        cwd: Path = ROOT,
        new_session: bool = False,
    ) -> None:
        self.args = args
        self._process = FORKED.Process(
            target=_run, args=(list(args), output, errors, dict(os.environ if env is None else env), cwd, new_session)
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        if not wait([self._process.sentinel], timeout):
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        self._process.join()
        assert self._process.exitcode is not None
        return self._process.exitcode


def python(
    *args: str, env: Mapping[str, str] | None = None, cwd: Path = ROOT, timeout: float | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `python ARGS` as `subprocess.run` does with `capture_output` and `text`."""
    with TemporaryDirectory() as folder:
        output, errors = (Path(folder) / name for name in ("stdout", "stderr"))
        code = Started(args, output, errors, env, cwd).wait(timeout)
        return subprocess.CompletedProcess(args, code, output.read_text(), errors.read_text())


def _run(args: list[str], output: Path, errors: Path, env: dict[str, str], cwd: Path, new_session: bool) -> None:
    if new_session:
        os.setsid()
    for stream, file in ((1, output), (2, errors)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    try:
        if args[0] == "-c":
            exec(args[1], {"__name__": "__main__"})
        elif args[0] == "-m":
            sys.path[:0] = ["", *env.get("PYTHONPATH", "").split(os.pathsep)]
            sys.argv = args[1:]
            sys.modules.pop(args[1], None)  # it runs as `__main__`, as if it had not been imported
            runpy.run_module(args[1], run_name="__main__", alter_sys=True)
        else:
            sys.path[:0] = [str(Path(args[0]).resolve().parent), *env.get("PYTHONPATH", "").split(os.pathsep)]
            sys.argv = args
            runpy.run_path(args[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # forked processes end without them
