"""Plant faults in a copy of the package, one at a time, and show that the test named beside each fails.

    python -m tests.planted                  # all of faults.yaml
    python -m tests.planted --only router    # those whose area, description or file contains a word

First all named tests run on the unchanged copy and must pass. Then each fault replaces one piece of text in one file, and its
test must fail. Exit code 1 if a test fails without its fault, or a fault goes unnoticed; 2 if a fault cannot be planted.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import yaml

ROOT = Path(__file__).parents[2]
SECONDS = 180.0  # longest time for one test
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=", "--tb=short")


@dataclass(frozen=True)
class Fault:
    """One change of the package that makes it wrong."""

    area: str
    fault: str  # effect for a user
    file: str
    old: str  # text to replace, which the file contains once
    new: str
    test: str  # that must fail, as pytest names it

    def problem(self) -> str | None:
        count = (ROOT / self.file).read_text().count(self.old)
        if count != 1:
            return f"{self.file} contains {self.old!r} {count} times; the fault needs it once"
        return "the fault changes nothing" if self.old == self.new else None

    def plant(self, tree: Path) -> None:
        file = tree / self.file
        file.write_text(file.read_text().replace(self.old, self.new))
        now = time.time() + 10  # Python compares the source's time with that in its cached bytecode
        os.utime(file, (now, now))


def read_faults(words: str) -> list[Fault]:
    faults = [Fault(**entry) for entry in yaml.safe_load((Path(__file__).parent / "faults.yaml").read_text())]
    return [fault for fault in faults if words in f"{fault.area} {fault.fault} {fault.file}"]


def copy_tree(folder: Path) -> Path:
    """Copy the tracked and new files of the repository, with a link to its data."""
    names = subprocess.check_output(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, text=True)
    for name in filter(None, names.split("\0")):
        if (ROOT / name).exists() or (ROOT / name).is_symlink():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
    (ROOT / "data").mkdir(exist_ok=True)
    (folder / "data").symlink_to(ROOT / "data")
    return folder


def run_tests(tree: Path, tests: list[str], faulty: bool, *options: str) -> tuple[int | None, str]:
    """Run tests in `tree`; return pytest's exit code (None: it took too long) and what it printed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{tree}:{tree / 'docs/examples'}"}
    if faulty:
        environment["PYTHONDONTWRITEBYTECODE"] = "1"
    command, streams = [*PYTEST, *options, *tests], {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(command, cwd=tree, env=environment, text=True, start_new_session=True, **streams)
    try:
        output, _ = process.communicate(timeout=SECONDS if faulty else None)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        return None, ""
    finally:
        if process.poll() is None or faulty:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with the ranks and runs that the test has started
            process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="WORDS", help="part of an area, description or file")
    parser.add_argument("--workers", type=int, default=2, help="faults at a time, each in a copy of its own")
    options = parser.parse_args()
    started, faults = time.monotonic(), read_faults(options.only)
    if problems := [f"{fault.area}: {problem}" for fault in faults if (problem := fault.problem())]:
        print("\n".join(problems))
        return 2
    with tempfile.TemporaryDirectory(prefix="planted-") as folder:
        trees: SimpleQueue[Path] = SimpleQueue()
        for number in range(options.workers):
            trees.put(copy_tree(Path(folder, str(number))))
        tree = trees.get()
        tests = list(dict.fromkeys(fault.test for fault in faults))
        code, output = run_tests(tree, tests, False, "-n", str(options.workers))
        trees.put(tree)
        if code != 0:
            print(output, "a test fails without its fault", sep="\n")
            return 1

        def judge(fault: Fault) -> tuple[bool, str]:
            tree = trees.get()
            try:
                fault.plant(tree)
                code, output = run_tests(tree, [fault.test], True, "-x")
            finally:
                shutil.copy2(ROOT / fault.file, tree / fault.file)
                trees.put(tree)
            error, *_ = *re.findall(r"^E\s+(.+)$", output, re.MULTILINE), "no error message"
            ends = {None: f"no end within {SECONDS:.0f} s", 0: "NOT NOTICED", 1: error.replace("|", "/")[:90]}
            return code == 1, ends.get(code, f"pytest ended with {code}")

        print(f"{len(tests)} tests pass without a fault ({time.monotonic() - started:.0f} s)\n")
        print("| area | fault | test | first error |\n|---|---|---|---|")
        noticed = 0
        with ThreadPoolExecutor(options.workers) as pool:
            for fault, (red, text) in zip(faults, pool.map(judge, faults), strict=True):
                noticed += red
                print(f"| {fault.area} | {fault.fault} | {fault.test.removeprefix('tests/')} | {text} |", flush=True)
        print(f"\n{noticed} of {len(faults)} faults noticed in {time.monotonic() - started:.0f} s")
        return int(noticed < len(faults))


if __name__ == "__main__":
    sys.exit(main())
