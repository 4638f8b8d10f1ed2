"""Compare the losses that two commits train to, before a change of the numerics is merged: `make convergence`.

Trains the PR-MoE of `convergence.yaml` for 2,000 steps with the code of two commits, in fp32 and in bf16-mixed, with each seed.
A seed fixes initial weights, data and noise, so runs come in pairs. Two runs that differ in rounding alone diverge within a few
hundred steps, as runs of different seeds do. The effect of the change is the mean difference in the final validation loss; it
must be at most 0.005 nats in either precision.

`false alarm` is the probability, by the standard error over seeds, of a mean difference above the limit where there is none; if
it is above 5%, give more `--seeds`. `--control` measures the noise: the older commit against itself, with a learning rate that is
a millionth larger. Each commit is checked out into a temporary worktree, without uncommitted changes. Finished runs are kept in
`--out` and not repeated; results go to docs/results/convergence.json.

    python -m benchmarks.convergence [--against 338e1af] [--revision HEAD] [--seeds 3] [--control] [--tiny]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from statistics import NormalDist
from typing import Any

from benchmarks.documents import markdown_table
from benchmarks.runs import ROOT, git
from nlgmoe.files import write_json
from nlgmoe.tools.statistics import paired_difference

LIMIT = 0.005  # nats
PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed"}
CONTROL = ["--model.optimizer.lr=0.003000003"]  # a millionth more: another rounding of some weights in the first steps
TINY = ["--model.train_tokens=1024", "--model.schedule.decay_tokens=1024", "--model.schedule.warmup_tokens=512"]
TINY += ["--data.max_eval_windows=1"]


@contextmanager
def checked_out(commit: str, out: Path) -> Iterator[Path]:
    """Yield a temporary worktree of a commit."""
    folder = Path(tempfile.mkdtemp(prefix="tree-", dir=out))
    git("worktree", "add", "--detach", str(folder), commit)
    try:
        yield folder
    finally:
        git("worktree", "remove", "--force", str(folder))


def run(tree: Path, folder: Path, precision: str, seed: int, data: Path, more: list[str]) -> float:
    """Train with the code of `tree`, unless the run has ended; return the last validation loss."""
    summary = folder / "summary.json"
    if not summary.exists():
        shutil.rmtree(folder, ignore_errors=True)  # of an interrupted comparison
        folder.mkdir(parents=True)
        command = [sys.executable, "train.py", "fit", f"--config={ROOT / 'benchmarks/convergence.yaml'}", *more]
        command += [f"--model.seed={seed}", f"--data.seed={seed}", f"--data.data_dir={data.resolve()}"]
        command += [f"--trainer.precision={PRECISIONS[precision]}", f"--trainer.default_root_dir={folder}"]
        with (folder / "log.txt").open("w") as log:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, cwd=tree, stdout=log, stderr=subprocess.STDOUT, env=environment)
        if done.returncode:
            raise RuntimeError(f"{folder.name} ended with exit code {done.returncode}: {folder / 'log.txt'}")
    loss: float = json.loads(summary.read_text())["val_loss"]
    print(f"{folder.name}: val_loss {loss:.4f}", flush=True)
    return loss


def compare(old: Sequence[float], new: Sequence[float]) -> dict[str, Any]:
    """Return the mean of new minus old over seeds, its standard error (None for one seed), and `false_alarm`."""
    found = paired_difference(new, old)
    error = found.error if found.pairs > 1 else None
    return {
        "losses": {"old": list(old), "new": list(new)},
        "difference": found.mean,
        "standard_error": error,
        "false_alarm": 2 * NormalDist(sigma=error).cdf(-LIMIT) if error else 0.0,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Train, print the differences, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", default="338e1af", help="the older commit")
    parser.add_argument("--revision", default="HEAD", help="the newer commit")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--control", action="store_true", help="the older commit against itself, for the noise")
    parser.add_argument("--tiny", action="store_true", help="two steps of one seed in fp32, to test the script")
    parser.add_argument("--data_dir", type=Path, default=ROOT / "data/pocket_pile")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/convergence", help="folder of the runs")
    args = parser.parse_args(argv)
    out = args.out.resolve()  # git runs in the repository's root
    out.mkdir(parents=True, exist_ok=True)
    revisions = {"old": args.against, "new": args.against if args.control else args.revision}
    commits = {which: git("rev-parse", "--verify", f"{name}^{{commit}}") for which, name in revisions.items()}
    if not args.control and git("status", "--porcelain", "--", "nlgmoe", "train.py"):
        print(f"uncommitted changes are not in {args.revision}", file=sys.stderr)
    seeds, precisions = range(1 if args.tiny else args.seeds), list(PRECISIONS)[: 1 if args.tiny else 2]
    with (
        checked_out(commits["old"], out) as old,
        checked_out(commits["new"], out) as new,
        ThreadPoolExecutor(2) as pool,  # a thread each
    ):
        pending = {}
        for precision, seed, (which, tree) in product(precisions, seeds, {"old": old, "new": new}.items()):
            control = args.control and which == "new"
            name = f"{commits[which][:10]}-{precision}-{seed}{'-control' * control}{'-tiny' * args.tiny}"
            more = TINY * args.tiny + CONTROL * control
            job = pool.submit(run, tree, out / name, precision, seed, args.data_dir, more)
            pending[precision, which, seed] = job
        try:
            losses = {key: job.result() for key, job in pending.items()}
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # those that have not begun
            raise
    found = {
        precision: compare(*([losses[precision, which, seed] for seed in seeds] for which in commits))
        for precision in precisions
    }
    file = (out if args.tiny else ROOT / "docs/results") / "convergence.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    words = " ".join(sys.argv[1:] if argv is None else argv)
    about = {"command": f"python -m benchmarks.convergence {words}".rstrip(), "limit": LIMIT, **commits}
    write_json(file, results | {"control" if args.control else "comparison": {**about, "precisions": found}})
    head = [
        f"nats, {len(seeds)} seed(s)",
        f"{commits['new'][:7]} - {commits['old'][:7]}",
        "standard error",
        "false alarm",
    ]
    rows = [
        [name, f"{row['difference']:+.4f}", f"{row['standard_error'] or 0:.4f}", f"{row['false_alarm']:.1%}"]
        for name, row in found.items()
    ]
    print(f"\n{markdown_table(head, rows)}\nwritten to {file}")
    if any(abs(row["difference"]) > LIMIT for row in found.values()):
        sys.exit(f"a mean difference is above {LIMIT} nats")


if __name__ == "__main__":
    main()
