"""Train the missing runs of a campaign with the code of one commit, and write their results to one JSON file."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

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
from benchmarks.reproduce.scale import CONFIGS, CPU, Scale, machine, run_settings
from benchmarks.runs import ROOT
from benchmarks.training import Launcher, Run, call, train
from nlgmoe.config import GPTConfig
from nlgmoe.distill.offline_teacher import HEADER, POSITION
from nlgmoe.experiment import parse_config
from nlgmoe.files import write_json
from nlgmoe.model.counting import count_parameters, flops_per_token

Trained = tuple[Cell, int, float | None]  # cell, seed, and the learning rate of a search


class Recording(Run):
    """The recording of a teacher's logits: `files` are those of the student's data, and further words of the command."""

    @property
    def has_ended(self) -> bool:
        """See `Run`; one that was stopped has its position."""
        return (self.folder / HEADER).exists() and not (self.folder / POSITION).exists()

    def train(self, launch: Launcher) -> str:
        """See `Run`."""
        command = ["-m", "nlgmoe", "distill-logits", *self.files, "--output", str(self.folder)]
        call(launch, self.name, command, self.folder.with_suffix(".log"), self.tree)
        return "recorded"


class Campaign:
    """The runs of one commit, and their results.

    Args:
        folder: of runs.
        results: JSON file; what it has is trained again only if another run needs its checkpoints and they are not in
            `folder`. It is written when runs have ended or failed.
        commit: of the code that trains.
        tree: folder of that code.
        scale: size of the runs.
        launch: starts a command.

    Raises:
        ValueError: the results are of another commit or scale.
    """

    def __init__(
        self, folder: Path, results: Path, commit: str, tree: Path, scale: Scale = CPU, launch: Launcher | None = None
    ) -> None:
        self.folder, self.file, self.tree, self.scale = folder, results, tree, scale
        self._launch = launch or Launcher()
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

    def _all(self, runs: list[Trained], jobs: int) -> None:
        self._collect(runs)
        missing = [run for run in runs if self.key(*run) not in self.results["runs"]]
        needed = {*missing, *((cell, seed, None) for run in missing for cell, seed in self._before(*run))}
        lines: dict[tuple[str, int, float | None], list[Run]] = {}
        for cell, seed, rate in [run for run in runs if run in needed]:
            taught = cell.distilled is not None or cell.config == TEACHER.config
            line = lines.setdefault(("taught" if taught else cell.config, seed, rate), [])
            if cell.distilled and not any(isinstance(run, Recording) for run in line):
                line.append(self._recording(seed))
            line.append(self.run(cell, seed, rate))
        try:
            train([*lines.values()], jobs, self._launch)
        finally:
            self._collect(missing)

    def _collect(self, runs: Iterable[Trained]) -> None:
        """Write the results of runs that have ended and are not in the file."""
        for run in runs:
            if self.key(*run) not in self.results["runs"] and self.run(*run).has_ended:
                self.results["runs"][self.key(*run)] = self._record(*run)
        write_json(self.file, self.results)

    def _before(self, cell: Cell, seed: int, rate: float | None) -> list[tuple[Cell, int]]:
        """Return the runs whose checkpoints this one needs."""
        teacher = TEACHER if cell.distilled and not self._recording(seed).has_ended else None
        sources = [cell.trunk, teacher] if rate is None else []
        return [(source, seed) for source in sources if source is not None]

    def key(self, cell: Cell, seed: int, rate: float | None = None) -> str:
        """Return the name of a run."""
        return f"{cell.name}-seed{seed}" + (f"-lr{rate:g}" if rate is not None else "")

    def run(self, cell: Cell, seed: int, rate: float | None = None) -> Run:
        """Return the run of a cell and a seed; with a rate, of the search for one."""
        key, steps = self.key(cell, seed, rate), round(cell.budget * self.scale.steps)
        files = (*map(str, self._configs(cell.config)), json.dumps(self.settings(cell, seed, rate)))
        keep = rate is None and (cell == TEACHER or any(cell == other.trunk for other in TABLES))
        trunk, start = None, 0
        if rate is None and cell.trunk is not None:
            start = round(cell.budget * (1 - COOLDOWN) * self.scale.steps)
            trunk = self.folder / self.key(cell.trunk, seed) / f"checkpoints/step-{start}.ckpt"
        return Run(key, self.folder / key, files, steps, trunk, start, keep, self.tree)

    def _record(self, cell: Cell, seed: int, rate: float | None) -> dict[str, Any]:
        """Return the result of a run that has ended."""
        summary, settings = self.run(cell, seed, rate).summary, self.settings(cell, seed, rate)
        shape = self.shape(cell.config)
        count = count_parameters(shape)
        return {
            "val_loss": summary["val_loss"],
            "bits_per_byte": summary["bits_per_byte"]["all"],
            "seed": seed,
            "learning_rate": settings["model"]["optimizer"]["lr"],
            "tokens": summary["tokens"],
            "tokens_per_active_parameter": summary["tokens"] / count.active,
            "params_total": count.total,
            "params_active": count.active,
            "flops_per_token": flops_per_token(shape),
            "seconds": summary["wall_seconds"],
            "tokens_per_second": summary["tokens_per_second"],
            "config_sha256": hashlib.sha256(
                b"".join(file.read_bytes() for file in self._configs(cell.config))
                + json.dumps({**settings["model"], **settings["data"]}, sort_keys=True, default=str).encode()
            ).hexdigest(),
        }

    def _logits(self, seed: int) -> Path:
        """Return the folder of the teacher's logits for the samples of a seed."""
        return self.folder / f"logits-seed{seed}"

    def _recording(self, seed: int) -> Recording:
        """Return the recording of the teacher's logits."""
        settings = json.dumps(run_settings(self.scale, self.tree, self.scale.steps, seed, 1e-3))
        samples = self.scale.steps * self.scale.step_tokens // self.shape("student").seq_len
        options = {"--teacher": self.folder / self.key(TEACHER, seed), "--samples": samples, "--top-k": 32}
        files = (*map(str, self._configs("student")), settings, *(str(w) for pair in options.items() for w in pair))
        return Recording(f"logits-seed{seed}", self._logits(seed), files, steps=0, tree=self.tree)

    def settings(self, cell: Cell, seed: int, rate: float | None) -> dict[str, Any]:
        """Return the settings of a run besides the files of configs/reproduce."""
        steps, rate = round(cell.budget * self.scale.steps), rate or self.learning_rate(cell.config)
        settings = run_settings(self.scale, self.tree, steps, seed, rate)
        if cell.distilled:
            logits = {"logits": str(self._logits(seed))}
            settings["model"]["distiller"] = {"class_path": "nlgmoe.OfflineTeacher", "init_args": logits}
        if cell.distilled == "staged":
            stage = {"class_path": "nlgmoe.StagedDistillation", "init_args": {"fraction": STAGED}}
            settings["trainer"]["callbacks"].append(stage)
        return settings

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
