"""What `nlgmoe inspect --simulate` prints: the simulated rank beside the prediction."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from nlgmoe.config import GPTConfig
from nlgmoe.tools.planner.machine import Prediction
from nlgmoe.tools.planner.simulate import Simulated, simulate
from nlgmoe.tools.planner.topology import Topology

__all__ = ["as_json", "as_text", "simulate"]
COMMUNICATOR = 688e6
"""Bytes of a NCCL communicator, on A100s (github.com/NVIDIA/nccl/issues/964); an estimate, as `hardware.RESERVED` is."""

NOT_SHOWN = (
    "not simulated: kernels and their speed, stragglers, NCCL's own memory, bandwidth, a teacher, text, callbacks"
)


def as_json(
    config: GPTConfig, topology: Topology, prediction: Prediction, simulated: Simulated, disk: float
) -> dict[str, Any]:
    """Return prediction and simulation under the same keys; bytes, seconds and counts."""
    groups = topology.communicators(config)
    predicted: dict[str, Any] = {
        "peak_bytes": prediction.memory.total,
        "bytes": asdict(prediction.communication),
        "communicators": groups,
        "communicator_bytes": int(COMMUNICATOR * len(groups)),
    }
    found = {
        "rank": simulated.rank,
        "peak_bytes": simulated.peak_bytes,
        "bytes": dict.fromkeys(predicted["bytes"], 0) | simulated.sent,
        "calls": simulated.calls,
        "communicators": simulated.groups,
        "resume_opens": simulated.resume_opens,
        "resume_bytes": simulated.resume_bytes,
        "checkpoint_bytes": simulated.checkpoint_bytes,
        "save_seconds": simulated.checkpoint_bytes / (disk * 1e9),
        "resume_seconds": simulated.resume_bytes * topology.gpus / (disk * 1e9),
    }
    return {"predicted": predicted, "simulated": found}


def as_text(report: dict[str, Any], topology: Topology) -> str:
    """Format the result of `as_json`."""
    predicted, found = report["predicted"], report["simulated"]
    lines = [("", f"{'predicted':>14}{'simulated':>14}")]
    for index, (kind, sent) in enumerate(found["bytes"].items()):
        title = f"sent by rank {found['rank']}, MB" if index == 0 else ""
        expected = f"{predicted['bytes'][kind] / 1e6:,.3f}" if kind in predicted["bytes"] else ""
        calls = f"{found['calls'].get(kind, 0):>6} calls  {kind.replace('_', ' ')}"
        lines.append((title, f"{expected:>14}{sent / 1e6:>14,.3f}{calls}"))
    peaks = [values["peak_bytes"] for values in (predicted, found)]
    lines.append(
        ("peak memory, GiB", "".join(f"{peak / 2**30:>14.2f}" for peak in peaks) + f"  {peaks[0] / peaks[1] - 1:+.1%}")
    )
    sizes = ["".join(f"{len(values['communicators']):>14}") for values in (predicted, found)]
    ranks = ", ".join(map(str, found["communicators"]))
    gib = predicted["communicator_bytes"] / 2**30
    lines += [
        ("communicators", f"{''.join(sizes)}  of {ranks} ranks; about {gib:.1f} GiB of NCCL's, beyond the tensors"),
        ("save", f"{found['checkpoint_bytes'] / 1e9:,.1f} GB of all ranks, {found['save_seconds']:,.0f} s"),
        (
            "resume",
            f"{found['resume_opens']} files opened and {found['resume_bytes'] / 1e9:,.2f} GB read by this rank, by the layout; "
            f"{found['resume_seconds']:,.0f} s for all {topology.gpus} ranks",
        ),
    ]
    return "\n".join(f"{title:<23}{text}" for title, text in lines) + f"\n{NOT_SHOWN}"
