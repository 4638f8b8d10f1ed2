"""Full and unwritable disks: a file system without space, one rank of two that cannot write, a file in the folder's place."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.disk_full import check_goes_on, check_refused_write
from tests.faults.fault import Fault
from tests.faults.harness import Ended, Run
from tests.faults.results import Results

# A file system of its own for one command: mounted where no other process sees it, copied out at the end.
ON_SMALL_DISK = """
size=$1 run=$2 kept=$3; shift 3
mount -t tmpfs -o size=$size none $run || exit
"$@"; code=$?
cp -a $run/. $kept; exit $code
"""


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _without(folder: Path, ended: Ended) -> list[str]:
    return [error.replace(f"{folder}/", "") for error in ended.errors]


def test_a_full_disk(undisturbed: Run, tmp_path: Path, results: Results) -> None:
    tried = subprocess.run(["unshare", "-m", "true"], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"this machine lets nobody mount: {tried.stderr.strip()}")
    run = Run(tmp_path / "run", undisturbed.data)
    run.folder.mkdir()
    kept = tmp_path / "kept"
    kept.mkdir()
    size = int(1.5 * _size(undisturbed.folder / "checkpoints" / "last.ckpt"))  # step-3, not step-6 too
    disk = ["unshare", "-m", "sh", "-c", ON_SMALL_DISK, "sh", str(size), str(run.folder), str(kept), sys.executable]
    ended = run.launch(["--trainer.devices=1"], launcher=disk).wait()
    assert not any(run.folder.iterdir())
    shutil.copytree(kept, run.folder, symlinks=True, dirs_exist_ok=True)
    check_refused_write(run, ended, reason="No space left on device")
    results.add("disk full", {"errors": _without(tmp_path, ended)})
    assert run.checkpoints() == {"step-3.ckpt": 3, "last.ckpt": 3}
    check_goes_on(run, undisturbed)


def test_a_rank_that_cannot_write(undisturbed_ranks: Run, tmp_path: Path, results: Results) -> None:
    run = Run(tmp_path / "run", undisturbed_ranks.data, ranks=2)
    ended = run.start(Fault("writing", count=5, action="fill", limit=100_000, rank=1))
    check_refused_write(run, ended, reason="File too large")
    assert all("rank 1: " in error for error in ended.errors)  # both ranks say whose disk it was
    results.add("disk full, rank 1 of 2", {"errors": _without(tmp_path, ended)})
    check_goes_on(run, undisturbed_ranks)


def test_a_file_where_the_checkpoints_should_be(pocket_pile: Path, tmp_path: Path, results: Results) -> None:
    run = Run(tmp_path / "run", pocket_pile, ranks=2)
    run.folder.mkdir()
    (run.folder / "checkpoints").write_text("in the way")
    ended = run.start()
    assert ended.code == 1
    assert ended.errors and all(f"{run.folder}/checkpoints" in error for error in ended.errors), ended.output
    assert "Traceback" not in ended.output
    assert (run.folder / "checkpoints").read_text() == "in the way"
    results.add("no folder", {"errors": _without(tmp_path, ended)})
