"""nlgmoe: mixture-of-experts language models on PyTorch Lightning.

The names below are the public interface. Each is imported at its first use: `import nlgmoe` is fast, and changes nothing in the
process.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nlgmoe.callbacks.staged_distillation import StagedDistillation
    from nlgmoe.checkpoint.portable import load_model
    from nlgmoe.config import GPTConfig, MoEConfig
    from nlgmoe.data import PileDataModule
    from nlgmoe.distill.mixture_of_students import MixtureOfStudents
    from nlgmoe.distill.offline_teacher import OfflineTeacher
    from nlgmoe.eval.generation import generate
    from nlgmoe.eval.loaded_model import LoadedModel, load_pretrained
    from nlgmoe.experiment import Experiment, load_config
    from nlgmoe.layers.attention import AttentionContext
    from nlgmoe.layers.mla import MLAConfig
    from nlgmoe.layers.moe import MoELayer
    from nlgmoe.layers.rotary import Llama3, Yarn
    from nlgmoe.layers.router import Router
    from nlgmoe.layers.routers import (
        FrozenRouterConfig,
        HashedRouterConfig,
        HashRouterConfig,
        QuantileRouterConfig,
        SigmoidRouterConfig,
        UniformRouterConfig,
        UnitWeightRouterConfig,
    )
    from nlgmoe.layers.routing import Routing, RoutingContext
    from nlgmoe.model.gpt import GPT, GPTOutput
    from nlgmoe.module import MoEGPTModule
    from nlgmoe.parallel.strategy import ExpertParallelStrategy
    from nlgmoe.parts import AttentionConfig, ExpertConfig, RotaryScaling, RouterConfig
    from nlgmoe.pyramid import experts_at, student_layers
    from nlgmoe.surgery.warm_start import WarmStart
    from nlgmoe.tools.lm_eval.zero_shot_eval import ZeroShotEval
    from nlgmoe.tools.report.write_report import WriteReport
    from nlgmoe.versions import __version__

_NAMES = {
    "callbacks.staged_distillation": "StagedDistillation",
    "checkpoint.portable": "load_model",
    "config": "GPTConfig MoEConfig",
    "data": "PileDataModule",
    "distill.mixture_of_students": "MixtureOfStudents",
    "distill.offline_teacher": "OfflineTeacher",
    "eval.generation": "generate",
    "eval.loaded_model": "LoadedModel load_pretrained",
    "experiment": "Experiment load_config",
    "layers.attention": "AttentionContext",
    "layers.mla": "MLAConfig",
    "layers.moe": "MoELayer",
    "layers.rotary": "Llama3 Yarn",
    "layers.router": "Router",
    "layers.routing": "Routing RoutingContext",
    "layers.routers": "FrozenRouterConfig HashedRouterConfig HashRouterConfig QuantileRouterConfig SigmoidRouterConfig "
    "UniformRouterConfig UnitWeightRouterConfig",
    "model.gpt": "GPT GPTOutput",
    "module": "MoEGPTModule",
    "parallel.strategy": "ExpertParallelStrategy",
    "parts": "AttentionConfig ExpertConfig RotaryScaling RouterConfig",
    "pyramid": "experts_at student_layers",
    "surgery.warm_start": "WarmStart",
    "tools.lm_eval.zero_shot_eval": "ZeroShotEval",
    "tools.report.write_report": "WriteReport",
    "versions": "__version__",
}  # module -> public names, as above
_MODULES = {name: f"nlgmoe.{module}" for module, names in _NAMES.items() for name in names.split()}
__all__ = sorted(name for name in _MODULES if name != "__version__")


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
