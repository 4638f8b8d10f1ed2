"""Train the missing runs, some at a time; write each result to one JSON file when its run ends.

All runs of a campaign use the code of one commit. A killed run resumes its newest checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from threading import Lock
from typing import Any

import yaml

from benchmarks.reproduce.cells import (
    COOLDOWN,
    LOWER_RATE,
    RATES,
    STAGED,
    TABLES,
    TEACHER,
    TUNED,
    TUNING_BUDGET,
    WIDER,
    WIDEST,
    Cell,
)
from benchmarks.reproduce.launching import CONFIGS, CPU, Launch, Scale, call, fit, launch, machine, run_settings
from benchmarks.runs import ROOT
from nlgmoe.config import GPTConfig
from nlgmoe.experiment import parse_config
from nlgmoe.files import write_json
from nlgmoe.model.counting import count_parameters, flops_per_token


class Campaign:
    """The runs of one commit, and their results.

    Args:
        folder: of runs.
        results: JSON file; what it has is trained again only if another run needs its checkpoints and they are not in
            `folder`. Then the second loss is kept beside the first.
        commit: of the code that trains.
        tree: folder of that code.
        scale: size of the runs.
        run: starts a command.

    Raises:
        ValueError: the results are of another commit or scale.
    """

    def __init__(
        self, folder: Path, results: Path, commit: str, tree: Path, scale: Scale = CPU, run: Launch = launch
    ) -> None:
        self.folder, self.file, self.tree, self.scale, self._run = folder, results, tree, scale, run
        head = {"commit": commit, "scale": scale.name, "machine": machine()}
        self.results: dict[str, Any] = {**head, "learning_rates": {}, "runs": {}}
        if results.exists():
            self.results = json.loads(results.read_text())
            for name in ("commit", "scale"):
                if self.results[name] != head[name]:
                    raise ValueError(
                        f"{results} has {name} {self.results[name]}, this is {head[name]}: runs of both are no pairs; train with "
                        f"that one, or name another --results"
                    )
        self._lock = Lock()
        self._shapes: dict[str, GPTConfig] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def tune(self, jobs: int, configs: set[str]) -> None:
        """Search the learning rates that `configs` need, on seed 0."""
        tuned = [name for name in TUNED if name != WIDEST or configs & set(WIDER[1:])]
        wanted = [(Cell(name, TUNING_BUDGET), rate) for name in tuned for rate in RATES]
        if WIDEST in tuned:
            wanted.append((Cell(WIDEST, TUNING_BUDGET), LOWER_RATE))
        self._all([(cell, 0, rate) for cell, rate in wanted], jobs)
        for name in tuned:
            losses = [self.results["runs"][self.key(Cell(name, TUNING_BUDGET), 0, rate)]["val_loss"] for rate in RATES]
            self.results["learning_rates"][name] = best_rate(RATES, losses)
        write_json(self.file, self.results)

    def train(self, runs: Iterable[tuple[Cell, int]], jobs: int) -> None:
        """Train the runs, each after the runs whose checkpoints it resumes."""
        self._all([(cell, seed, None) for cell, seed in runs], jobs)

    def _all(self, runs: list[tuple[Cell, int, float | None]], jobs: int) -> None:
        missing = [run for run in runs if self.key(*run) not in self.results["runs"]]
        sources = {source for run in missing for source in self._before(*run) if not self._has_checkpoints(*source)}
        missing = [run for run in runs if run in missing or (run[2] is None and run[:2] in sources)]
        self._left, self._began, self._done = sum(map(self._cost, missing)), time.monotonic(), 0.0
        running: dict[Future[None], tuple[Cell, int]] = {}
        with ThreadPoolExecutor(jobs) as pool:
            try:
                while missing or running:
                    unfinished = {*running.values(), *((cell, seed) for cell, seed, rate in missing if rate is None)}
                    ready = [run for run in missing if not unfinished & set(self._before(*run))]
                    for run in ready[: jobs - len(running)]:
                        missing.remove(run)
                        running[pool.submit(self._one, *run)] = run[:2]
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        del running[future]
                        future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _before(self, cell: Cell, seed: int, rate: float | None) -> list[tuple[Cell, int]]:
        """Return the runs whose checkpoints this one resumes."""
        sources = [cell.trunk, TEACHER if cell.distilled else None] if rate is None else []
        return [(source, seed) for source in sources if source is not None]

    def _has_checkpoints(self, cell: Cell, seed: int) -> bool:
        """Return True if other runs can resume this one, or need not, because the teacher's logits are recorded."""
        recorded = cell == TEACHER and (self.folder / f"logits-seed{seed}").exists()
        folder = self.folder / self.key(cell, seed)
        return recorded or ((folder / "checkpoints").exists() and (folder / "summary.json").exists())  # it has ended

    def key(self, cell: Cell, seed: int, rate: float | None = None) -> str:
        """Return the name of a run."""
        return f"{cell.name}-seed{seed}" + (f"-lr{rate:g}" if rate is not None else "")

    def _one(self, cell: Cell, seed: int, rate: float | None) -> None:
        key = self.key(cell, seed, rate)
        folder, learning_rate = self.folder / key, rate or self.learning_rate(cell.config)
        settings = self.settings(cell, seed, learning_rate)
        if cell.distilled:
            settings["model"]["distiller"] = {
                "class_path": "nlgmoe.OfflineTeacher",
                "init_args": {"logits": str(self._logits(seed))},
            }
        if cell.distilled == "staged":
            stage = {"class_path": "nlgmoe.StagedDistillation", "init_args": {"fraction": STAGED}}
            settings["trainer"]["callbacks"].append(stage)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "settings.yaml").write_text(yaml.safe_dump(settings))
        files = [*self._configs(cell.config), folder / "settings.yaml"]
        start = "auto"
        if rate is None and cell.trunk is not None:
            steps = round(cell.budget * (1 - COOLDOWN) * self.scale.steps)
            start = str(self.folder / self.key(cell.trunk, seed) / f"checkpoints/step-{steps}.ckpt")
        summary = fit(self._run, files, folder, self.tree, start)
        shape = self.shape(cell.config)
        count = count_parameters(shape)
        record = {
            "val_loss": summary["val_loss"],
            "bits_per_byte": summary["bits_per_byte"]["all"],
            "seed": seed,
            "learning_rate": learning_rate,
            "tokens": summary["tokens"],
            "tokens_per_active_parameter": summary["tokens"] / count.active,
            "params_total": count.total,
            "params_active": count.active,
            "flops_per_token": flops_per_token(shape),
            "seconds": summary["wall_seconds"],
            "tokens_per_second": summary["tokens_per_second"],
            "config_sha256": hashlib.sha256(
                b"".join(file.read_bytes() for file in files[:2])
                + json.dumps({**settings["model"], **settings["data"]}, sort_keys=True, default=str).encode()
            ).hexdigest(),
        }
        with self._lock:
            if first := self.results["runs"].get(key):  # trained again for its checkpoints
                record = {**first, "val_loss_again": record["val_loss"]}
            self.results["runs"][key] = record
            write_json(self.file, self.results)
            self._done += self._cost((cell, seed, rate))
            self._report(key, record)
        if rate is not None or not self._is_needed(cell):
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)

    def _logits(self, seed: int) -> Path:
        """Return the teacher's recorded logits for the samples of a seed; record them if they are missing."""
        with self._lock:  # one recording at a time
            folder = self.folder / f"logits-seed{seed}"
            if not folder.exists():
                settings = self.folder / f"logits-seed{seed}.yaml"
                settings.write_text(yaml.safe_dump(self.settings(Cell("student"), seed, 1e-3)))
                files = [*self._configs("student"), settings]
                teacher = self.folder / self.key(TEACHER, seed)
                samples = self.scale.steps * self.scale.step_tokens // self.shape("student").seq_len
                options = {"--teacher": teacher, "--output": folder, "--samples": samples, "--top-k": 32}
                words = [str(word) for pair in options.items() for word in pair]
                command = ["-m", "nlgmoe", "distill-logits", *map(str, files), *words]
                call(self._run, command, self.folder / f"logits-seed{seed}.log", self.tree)
            return folder

    def settings(self, cell: Cell, seed: int, rate: float) -> dict[str, Any]:
        """Return the settings of a run besides the files of configs/reproduce."""
        return run_settings(self.scale, self.tree, round(cell.budget * self.scale.steps), seed, rate)

    def shape(self, config: str) -> GPTConfig:
        """Return the model of a file of the code that trains."""
        if config not in self._shapes:
            override = self.scale.settings.get("model", {}).get("config", {})
            options = {f"model__config__{name}": value for name, value in override.items()}
            settings = parse_config(self._configs(config), **options)
            self._shapes[config] = GPTConfig.from_dict(settings["model"]["config"])
        return self._shapes[config]

    def _configs(self, config: str) -> list[Path]:
        """Return the files of a model; one that was added after the commit of the campaign is this commit's."""
        files = [CONFIGS / "base.yaml", CONFIGS / f"{config}.yaml"]
        return [(self.tree if (self.tree / file).exists() else ROOT) / file for file in files]

    def learning_rate(self, config: str) -> float:
        """Interpolate the learning rate: in the logarithm of the width, of dense models, times that of the number of experts."""
        rates, shape = self.results["learning_rates"], self.shape(config)
        rate = float(rates["dense"])
        if shape.hidden_size != self.shape("dense").hidden_size:
            widths = [math.log(self.shape(name).hidden_size) for name in ("dense", config, WIDEST)]
            rate = _between(rates["dense"], rates[WIDEST], (widths[1] - widths[0]) / (widths[2] - widths[0]))
        if shape.moe is None:
            return rate
        counts = shape.moe.num_experts
        experts = max(counts) if isinstance(counts, list) else counts
        if experts <= 8:
            of_experts = _between(rates["dense"], rates["moe_8"], math.log(experts) / math.log(8))
        else:
            of_experts = _between(rates["moe_8"], rates["moe_32"], math.log(experts / 8) / math.log(4))
        return of_experts * (rate / rates["dense"])

    def _is_needed(self, cell: Cell) -> bool:
        """Return True if other runs resume this cell's checkpoints."""
        return cell == TEACHER or any(cell == other.trunk for other in TABLES)

    def _cost(self, run: tuple[Cell, int, float | None]) -> float:
        cell, _, rate = run
        share = cell.budget * (COOLDOWN if rate is None and cell.trunk is not None else 1)
        return share * self.scale.steps * self.scale.step_tokens * flops_per_token(self.shape(cell.config))

    def _report(self, key: str, record: dict[str, Any]) -> None:
        elapsed = time.monotonic() - self._began
        left = elapsed / self._done * max(0.0, self._left - self._done)
        print(
            f"{time.strftime('%H:%M')} {key}: val_loss {record['val_loss']:.4f}, "
            f"{record['tokens_per_second'] or 0:,.0f} tokens/s; {self._done / self._left:.0%}, about {left / 3600:.1f} h left",
            flush=True,
        )


def best_rate(rates: Iterable[float], losses: Iterable[float]) -> float:
    """Return the minimum of the parabola through three losses over log learning rate, within the rates."""
    xs, ys = [math.log(rate) for rate in rates], list(losses)
    (a, b, c), (ya, yb, yc) = xs, ys
    curvature = ((yc - yb) / (c - b) - (yb - ya) / (b - a)) / (c - a)
    if curvature <= 0:
        return math.exp(xs[ys.index(min(ys))])
    slope = (yb - ya) / (b - a) - curvature * (b - a)  # at a
    return math.exp(min(max(a - slope / (2 * curvature), a), c))


def _between(first: float, second: float, share: float) -> float:
    return math.exp((1 - share) * math.log(first) + share * math.log(second))
