"""Lightning callbacks, one concern per file. They read the module and the trainer; most do not change training."""

from nlgmoe.callbacks.expert_load import ExpertLoad
from nlgmoe.callbacks.progress import TokenProgressBar
from nlgmoe.callbacks.routing_windows import RoutingWindows
from nlgmoe.callbacks.run_summary import RunSummary
from nlgmoe.callbacks.sample_text import SampleText
from nlgmoe.callbacks.staged_distillation import StagedDistillation
from nlgmoe.callbacks.throughput import Throughput
from nlgmoe.run.save_checkpoints import SaveCheckpoints
from nlgmoe.run.signals import StopOnSignal

__all__ = [
    "ExpertLoad",
    "RoutingWindows",
    "RunSummary",
    "SampleText",
    "SaveCheckpoints",
    "StagedDistillation",
    "StopOnSignal",
    "Throughput",
    "TokenProgressBar",
]
