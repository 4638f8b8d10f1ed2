"""nlgmoe: mixture-of-experts language models on PyTorch Lightning.

The names below are the public interface. They are looked up when first used, so `import nlgmoe` is quick and nothing
that a run does not need is imported.
"""

from __future__ import annotations

import importlib
import os
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nlgmoe.callbacks.staged_distillation import StagedDistillation
    from nlgmoe.checkpoint.portable import load_model
    from nlgmoe.checkpoint.warm_start import WarmStart
    from nlgmoe.config import GPTConfig, MoEConfig
    from nlgmoe.data import PileDataModule
    from nlgmoe.distill.mixture_of_students import MixtureOfStudents
    from nlgmoe.distill.offline_teacher import OfflineTeacher
    from nlgmoe.eval.expert_counts import count_experts
    from nlgmoe.eval.generation import generate
    from nlgmoe.eval.loaded_model import LoadedModel, load_pretrained
    from nlgmoe.eval.specialisation import Specialisation
    from nlgmoe.experiment import Experiment, load_config
    from nlgmoe.layers.moe import MoELayer
    from nlgmoe.layers.router import Router, Routing, RoutingContext
    from nlgmoe.layers.routers import FrozenTopK, HashRouterConfig, SigmoidTopK, SoftmaxTopK, UniformRouterConfig
    from nlgmoe.model.gpt import GPT, GPTOutput
    from nlgmoe.module import MoEGPTModule
    from nlgmoe.parallel.strategy import ExpertParallelStrategy
    from nlgmoe.parts import ExpertConfig, RouterConfig
    from nlgmoe.pyramid import experts_at, student_config, student_layers
    from nlgmoe.tools.lm_eval.zero_shot_eval import ZeroShotEval
    from nlgmoe.tools.report.write_report import WriteReport

# By default a thread of libgomp that waits for others spins so long that a step takes three times as long beside a busy process,
# and takes the core's other half from those that compute (docs/results/performance.md). torch's import reads the setting.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

# Without ipywidgets, Jupyter shows progress bars as text.
warnings.filterwarnings("ignore", message="IProgress not found")

_HOMES = {
    "Experiment": "nlgmoe.experiment",
    "ExpertConfig": "nlgmoe.parts",
    "ExpertParallelStrategy": "nlgmoe.parallel.strategy",
    "FrozenTopK": "nlgmoe.layers.routers",
    "GPT": "nlgmoe.model.gpt",
    "GPTConfig": "nlgmoe.config",
    "GPTOutput": "nlgmoe.model.gpt",
    "HashRouterConfig": "nlgmoe.layers.routers",
    "MoEConfig": "nlgmoe.config",
    "MoEGPTModule": "nlgmoe.module",
    "MixtureOfStudents": "nlgmoe.distill.mixture_of_students",
    "MoELayer": "nlgmoe.layers.moe",
    "OfflineTeacher": "nlgmoe.distill.offline_teacher",
    "PileDataModule": "nlgmoe.data",
    "Router": "nlgmoe.layers.router",
    "RouterConfig": "nlgmoe.parts",
    "Routing": "nlgmoe.layers.router",
    "RoutingContext": "nlgmoe.layers.router",
    "SigmoidTopK": "nlgmoe.layers.routers",
    "SoftmaxTopK": "nlgmoe.layers.routers",
    "Specialisation": "nlgmoe.eval.specialisation",
    "StagedDistillation": "nlgmoe.callbacks.staged_distillation",
    "UniformRouterConfig": "nlgmoe.layers.routers",
    "LoadedModel": "nlgmoe.eval.loaded_model",
    "WarmStart": "nlgmoe.checkpoint.warm_start",
    "WriteReport": "nlgmoe.tools.report.write_report",
    "ZeroShotEval": "nlgmoe.tools.lm_eval.zero_shot_eval",
    "count_experts": "nlgmoe.eval.expert_counts",
    "experts_at": "nlgmoe.pyramid",
    "generate": "nlgmoe.eval.generation",
    "load_config": "nlgmoe.experiment",
    "load_model": "nlgmoe.checkpoint.portable",
    "load_pretrained": "nlgmoe.eval.loaded_model",
    "student_config": "nlgmoe.pyramid",
    "student_layers": "nlgmoe.pyramid",
}

__all__ = [
    "GPT",
    "Experiment",
    "ExpertConfig",
    "ExpertParallelStrategy",
    "FrozenTopK",
    "GPTConfig",
    "GPTOutput",
    "HashRouterConfig",
    "LoadedModel",
    "MixtureOfStudents",
    "MoEConfig",
    "MoEGPTModule",
    "MoELayer",
    "OfflineTeacher",
    "PileDataModule",
    "Router",
    "RouterConfig",
    "Routing",
    "RoutingContext",
    "SigmoidTopK",
    "SoftmaxTopK",
    "Specialisation",
    "StagedDistillation",
    "UniformRouterConfig",
    "WarmStart",
    "WriteReport",
    "ZeroShotEval",
    "count_experts",
    "experts_at",
    "generate",
    "load_config",
    "load_model",
    "load_pretrained",
    "student_config",
    "student_layers",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
