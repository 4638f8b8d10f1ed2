"""What does a teacher bring, and is it better to let it go before the end? `make mos` answers.

The teacher is the PR-MoE of `configs/pr_moe/laptop.yaml`, trained for three times the student's tokens: after as many as the
student it is worse than the student alone (docs/log.md). For each seed the student of `configs/mos/laptop.yaml` is trained three
times: without the teacher, with it to the end, and with it for the first part (`StagedDistillation`, as the configuration says).
A seed fixes the data order and the initial weights, so that the three runs of a seed compare, and the difference within a seed
is what counts. Each run has one thread; one that was interrupted goes on, one that is finished is not repeated.

    python -m benchmarks.mos [--seeds 0 1 2] [--jobs 2] [--tokens N] [--teacher-tokens N] [--out runs/mos]
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from benchmarks.runs import ROOT, budget, mean_and_error, train
from nlgmoe import load_config
from nlgmoe.model.counting import count_parameters, flops_per_token

TEACHER, STUDENT = "configs/pr_moe/laptop.yaml", "configs/mos/laptop.yaml"
STUDENTS = {"alone": "without a teacher", "full": "distilled to the end", "staged": "staged"}
STAGING = "StagedDistillation"


def callbacks(keep: Callable[[dict[str, Any]], bool]) -> str:
    """Those of the student's configuration that are kept, as a setting."""
    return json.dumps([entry for entry in _student()["trainer"]["callbacks"] if keep(entry)])


def _student() -> dict[str, Any]:
    return yaml.safe_load((ROOT / STUDENT).read_text())


def stage_fraction() -> float:
    """Of the run that the staged student learns from its teacher."""
    (staging,) = (c for c in _student()["trainer"]["callbacks"] if c["class_path"].endswith(STAGING))
    return staging["init_args"]["fraction"]


def student(kind: str, seed: int, tokens: int | None, out: Path, teacher: Future[dict]) -> dict:
    """Train one of the students, after its teacher if it has one."""
    settings = {"model.seed": seed, "data.seed": seed, **budget(tokens)}
    if kind == "alone":
        settings["model.distiller"] = "null"
    else:
        teacher.result()
        settings["model.distiller.init_args.teacher"] = str(out / "teacher")
    if kind != "staged":
        settings["trainer.callbacks"] = callbacks(lambda entry: not entry["class_path"].endswith(STAGING))
    return train(STUDENT, out / f"{kind}-{seed}", settings, resume=True)


def losses(folder: Path) -> dict[int, float]:
    """The training loss on text by token count."""
    with (folder / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss"]]
    return {int(float(row["train/tokens"])): float(row["train/loss"]) for row in rows}


def plot(out: Path, seeds: list[int], gains: dict[str, dict[int, float]], tokens: int) -> None:
    """Draw `mos.png`: what the teacher brings while training goes on, and at its end."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (during, end) = plt.subplots(1, 2, figsize=(10, 4), width_ratios=(3, 1), layout="constrained")
    for kind, color in (("full", "tab:orange"), ("staged", "tab:blue")):
        curves = []
        for seed in seeds:
            alone, taught = losses(out / f"alone-{seed}"), losses(out / f"{kind}-{seed}")
            curves.append({at: alone[at] - taught[at] for at in sorted(alone.keys() & taught.keys())})
            during.plot(list(curves[-1]), list(curves[-1].values()), color=color, alpha=0.25, linewidth=1)
        at = sorted(set.intersection(*(set(curve) for curve in curves)))
        mean = [statistics.mean(curve[x] for curve in curves) for x in at]
        during.plot(at, mean, color=color, label=STUDENTS[kind])
        values = [gains[kind][seed] for seed in seeds]
        average, error = mean_and_error(values)
        end.bar([STUDENTS[kind].replace(" to ", "\nto ")], [average], yerr=[error], color=color, capsize=4)
    during.axvline(stage_fraction() * tokens, color="gray", linestyle=":", label="the staged teacher goes")
    during.axhline(0, color="black", linewidth=0.8)
    end.axhline(0, color="black", linewidth=0.8)
    during.set(xlabel="tokens", ylabel="training loss below the student alone (nats)", title="while training")
    end.set(ylabel="validation loss below the student alone (nats)", title="at the end")
    during.legend()
    figure.savefig(out / "mos.png", dpi=120)


def main() -> None:
    """Train, print the table, draw it, write `mos.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time, one thread each")
    parser.add_argument("--tokens", type=int, default=None, help="tokens per run instead of the configuration's")
    parser.add_argument("--teacher-tokens", type=int, default=None, help="of the teacher; default: three times as many")
    parser.add_argument("--out", type=Path, default=Path("runs/mos"))
    args = parser.parse_args()
    out = args.out.resolve()

    teacher_tokens = args.teacher_tokens or 3 * (args.tokens or _student()["model"]["train_tokens"])
    with ThreadPoolExecutor(args.jobs) as pool:
        teacher = pool.submit(train, TEACHER, out / "teacher", budget(teacher_tokens), resume=True)
        runs = [(kind, seed) for kind in STUDENTS for seed in args.seeds]  # those without a teacher first
        running = {run: pool.submit(student, *run, args.tokens, out, teacher) for run in runs}
        results = {run: future.result() for run, future in running.items()}

    summaries = {"teacher": [teacher.result()]}
    summaries |= {kind: [results[kind, seed] for seed in args.seeds] for kind in STUDENTS}
    names = {"teacher": "teacher", **STUDENTS}
    table: dict[str, Any] = {}
    print(f"\n{'model':<22} {'total':>8} {'MFLOP/token':>12} {'tokens':>10} {'val loss':>17} {'tokens/s':>9}")
    for kind, own in summaries.items():
        config = load_config(ROOT / (TEACHER if kind == "teacher" else STUDENT)).module.config
        total, flops = count_parameters(config).total, flops_per_token(config)
        loss, error = mean_and_error([summary["val_loss"] for summary in own])
        speed = statistics.median(summary["tokens_per_second"] for summary in own)
        table[kind] = {
            "val_loss": [summary["val_loss"] for summary in own],
            "tokens": own[0]["tokens"],
            "params_total": total,
            "flops_per_token": flops,
            "tokens_per_second": speed,
            "bits_per_byte": [summary["bits_per_byte"] for summary in own],
        }
        shown = f"{loss:.4f} ± {error:.4f}" if len(own) > 1 else f"{loss:.4f}         "
        print(
            f"{names[kind]:<22} {total / 1e6:>7.2f}M {flops / 1e6:>12.2f} {own[0]['tokens']:>10,} {shown:>17} {speed:>9,.0f}"
        )
    print("\nvalidation loss below the student's without a teacher, paired by seed (nats):")
    gains = {
        kind: {seed: results["alone", seed]["val_loss"] - results[kind, seed]["val_loss"] for seed in args.seeds}
        for kind in ("full", "staged")
    }
    for kind, by_seed in gains.items():
        gain, error = mean_and_error(list(by_seed.values()))
        table[f"alone_minus_{kind}"] = {"mean": gain, "standard_error": error, "by_seed": by_seed}
        print(f"  {names[kind]:<22} {gain:.4f} ± {error:.4f} ({gain / error:.1f} standard errors)")
    plot(out, args.seeds, gains, table["alone"]["tokens"])
    (out / "mos.json").write_text(json.dumps(table, indent=2) + "\n")
    print(f"written to {out / 'mos.json'} and {out / 'mos.png'}")


if __name__ == "__main__":
    main()
