"""Slurm's queue: which signal asks for another turn, and how to get it."""

from __future__ import annotations

import os
import signal
import subprocess

from lightning import Trainer
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn


def requeue_signal(trainer: Trainer) -> signal.Signals | None:
    """After which Slurm is asked to queue the job again."""
    environment = trainer._accelerator_connector.cluster_environment
    return (
        environment.requeue_signal if isinstance(environment, SLURMEnvironment) and environment.auto_requeue else None
    )


def queue_again() -> None:
    """Give the job back to Slurm, as Lightning would; the run is saved, so that failing to is no failure."""
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else error.strerror
        rank_zero_warn(f"scontrol requeue {job} failed ({reason}); submit the job again")
    else:
        rank_zero_info(f"Slurm job {job} is queued again")
