"""A full disk, of all ranks or of one, ends the run with one line of each rank; earlier checkpoints stay whole."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.harness import Ended, Run
from tests.faults.train_with_fault import Fault

# A file system of its own for one command: mounted where no other process sees it, copied out at the end.
ON_SMALL_DISK = """
size=$1 run=$2 kept=$3; shift 3
mount -t tmpfs -o size=$size none $run || exit
"$@"; code=$?
cp -a $run/. $kept; exit $code
"""


def check_refused_write(run: Run, ended: Ended, reason: str) -> None:
    """Check that each rank names the checkpoint, the reason and the remedy, and that nothing incomplete is left."""
    assert ended.code == 1 and "Traceback" not in ended.output, ended.output
    assert len(ended.errors) == 2, ended.output
    for error in ended.errors:
        assert str(run.folder) in error and ".ckpt" in error and reason in error and "make room" in error, error
    assert run.newest() > 0 and not run.leftovers()


def test_a_full_file_system(undisturbed: Run, tmp_path: Path) -> None:
    tried = subprocess.run(["unshare", "-m", "true"], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"this machine lets nobody mount: {tried.stderr.strip()}")
    run, kept = Run(tmp_path / "run", undisturbed.data), tmp_path / "kept"
    run.folder.mkdir(), kept.mkdir()
    checkpoint = undisturbed.folder / "checkpoints" / "last.ckpt"
    size = int(1.5 * sum(file.stat().st_size for file in checkpoint.iterdir()))  # room for one
    disk = ["unshare", "-m", "sh", "-c", ON_SMALL_DISK, "sh", str(size), str(run.folder), str(kept), sys.executable]
    ended = run.launch(["--trainer.devices=2"], launcher=disk).wait()
    shutil.copytree(kept, run.folder, symlinks=True, dirs_exist_ok=True)
    check_refused_write(run, ended, "No space left on device")
    run.finish_as(undisturbed)


def test_one_rank_of_two_cannot_write(undisturbed: Run, tmp_path: Path) -> None:
    run = Run(tmp_path / "run", undisturbed.data)
    ended = run.start(Fault(5, rank=1, action="fill"))
    check_refused_write(run, ended, "File too large")
    assert all("rank 1: " in error for error in ended.errors)  # both ranks name the rank whose disk is full
    run.finish_as(undisturbed)
