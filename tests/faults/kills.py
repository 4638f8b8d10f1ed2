"""A campaign of kills: runs that are killed again and again, started again each time, and compared at their end."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from tests.faults.fault import Fault, Moment
from tests.faults.harness import TIMEOUT_SECONDS, Ended, Run, differences

KILLS_A_RUN = 5
MOMENTS: list[Moment] = ["writing", "renaming", "deleting", "training", "writing"]
EVENTS = {"writing": 20, "renaming": 8, "deleting": 20}  # about those of the first three or four saves after a start
PARITY = {1: 0.0, 2: 1e-6}  # ranks: relative difference from the undisturbed run


@dataclass(frozen=True)
class Kill:
    """One kill of the campaign, and what was there afterwards.

    Attributes:
        victims: `all processes`, or the rank that was killed alone.
        happened: the moment, in words.
        had: step of the newest checkpoint before this start; 0: there was none.
        newest: step of the newest checkpoint afterwards, from which the next start goes on.
        leftovers: names of folders that the killed processes left.
        survivor_seconds: of a rank that was not killed: how long until it had ended.
        survivor_error: and what it said.
    """

    ranks: int
    run: int
    victims: str
    happened: str
    had: int
    newest: int
    leftovers: list[str]
    survivor_seconds: float | None = None
    survivor_error: str | None = None


@dataclass(frozen=True)
class Finished:
    """A run of the campaign at its end.

    Attributes:
        largest_difference: relative, over both losses and all rows of `metrics.csv`, from the undisturbed run.
    """

    ranks: int
    run: int
    kills: int
    train_loss: float
    val_loss: float
    largest_difference: float


def plan(ranks: int, seed: int) -> Iterator[Fault]:
    """Kills without end, drawn from the seed; on ranks every third one is of one rank alone."""
    for index in count():
        draw = random.Random(f"{seed} {ranks} {index}")
        moment = MOMENTS[index % len(MOMENTS)]
        if ranks > 1 and index % 3 == 2:  # the other ranks' only calls that name a checkpoint are those of writing
            delay = draw.choice([0.0, draw.uniform(0, 0.5)])
            yield Fault("writing", draw.randint(1, 4), delay=delay, rank=index // 3 % ranks, alone=True)
        elif moment == "training":
            yield Fault("training", delay=draw.uniform(0, 0.5 * ranks))
        else:
            delay = draw.uniform(0, 0.006) if moment == "writing" and draw.random() < 0.5 else 0.0
            yield Fault(moment, draw.randint(1, EVENTS[moment]), delay=delay)


def campaign(folder: Path, undisturbed: Run, kills: int, seed: int = 0) -> tuple[list[Kill], list[Finished]]:
    """Kill runs like the undisturbed one `kills` times, at most `KILLS_A_RUN` times each, and let each end.

    Raises:
        AssertionError: something was lost, or a run did not go on, or it ended elsewhere than the undisturbed one.
    """
    ranks = undisturbed.ranks
    faults = plan(ranks, seed)
    done: list[Kill] = []
    finished: list[Finished] = []
    while len(done) < kills:
        number = len(finished)
        run = Run(folder / f"run-{number}", undisturbed.data, ranks)
        mine: list[Kill] = []
        while len(mine) < min(KILLS_A_RUN, kills - len(done)):
            kill, ended = _kill(run, number, next(faults))
            if kill is None:  # the run came to its end before the moment did
                assert ended.code == 0, ended.output
                break
            print(f"  {kill}", flush=True)
            mine.append(kill)
        else:
            ended = _go_on(run, None)[0]
            assert ended.code == 0, ended.output
        done += mine
        finished.append(_compare(run, number, mine, undisturbed))
        print(f"  {finished[-1]}", flush=True)
    return done, finished


def _kill(run: Run, number: int, fault: Fault) -> tuple[Kill | None, Ended]:
    """Start the run, let the fault happen, and look at what is there."""
    had = max(run.checkpoints().values(), default=0)
    ended, swept = _go_on(run, fault)
    if ended.happened is None:
        return None, ended
    newest = max(run.checkpoints().values(), default=0)  # reads every checkpoint that has its name: none is damaged
    assert newest >= had, f"{fault}: the newest checkpoint was of step {had} and is of step {newest}"
    survivor = None
    if fault.alone:
        assert ended.seconds_after <= TIMEOUT_SECONDS + 5
        survivor = ended.errors[0] if ended.errors else None
        assert survivor is not None and ended.code != 0, f"{fault}: the other rank says nothing:\n{ended.output}"
    else:
        assert ended.code == -9, ended.output
    kill = Kill(
        run.ranks,
        number,
        f"rank {fault.rank}" if fault.alone else "all processes",
        ended.happened,
        had,
        newest,
        sorted(swept),
        round(ended.seconds_after, 1) if fault.alone else None,
        survivor,
    )
    return kill, ended


def _go_on(run: Run, fault: Fault | None) -> tuple[Ended, set[str]]:
    """Start the run. It must go on where its newest checkpoint is, and sweep away what earlier starts have left."""
    resumes_from = max(run.checkpoints().values(), default=0)
    old = run.leftovers()
    ended = run.start(fault)
    assert resumes_from == 0 or f"step-{resumes_from}.ckpt" in ended.output, ended.output
    left = run.leftovers()
    assert not left & old, f"not swept away: {left & old}"
    return ended, left


def _compare(run: Run, number: int, kills: list[Kill], undisturbed: Run) -> Finished:
    assert not run.leftovers(), run.leftovers()
    found = differences(run, undisturbed)
    largest = max(found.values(), default=0.0)
    assert largest <= PARITY[run.ranks], found
    summary = run.summary()
    return Finished(
        run.ranks,
        number,
        len(kills),
        summary["train_loss"],
        summary["val_loss"],
        largest,
    )
