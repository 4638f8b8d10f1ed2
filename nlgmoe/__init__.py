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
    from nlgmoe.eval.specialisation import Specialisation, count_experts
    from nlgmoe.experiment import Experiment, load_config
    from nlgmoe.layers.attention import AttentionContext
    from nlgmoe.layers.mla import MLAConfig
    from nlgmoe.layers.moe import MoELayer
    from nlgmoe.layers.rotary import Llama3, Yarn
    from nlgmoe.layers.router import Router, Routing, RoutingContext
    from nlgmoe.layers.routers import FrozenRouterConfig, HashRouterConfig, SigmoidRouterConfig, UniformRouterConfig
    from nlgmoe.model.gpt import GPT, GPTOutput
    from nlgmoe.module import MoEGPTModule
    from nlgmoe.parallel.strategy import ExpertParallelStrategy
    from nlgmoe.parts import AttentionConfig, ExpertConfig, RotaryScaling, RouterConfig
    from nlgmoe.pyramid import experts_at, student_config, student_layers
    from nlgmoe.surgery.warm_start import WarmStart
    from nlgmoe.tools.lm_eval.zero_shot_eval import ZeroShotEval
    from nlgmoe.tools.report.write_report import WriteReport

_NAMES = {
    "nlgmoe.callbacks.staged_distillation": "StagedDistillation",
    "nlgmoe.checkpoint.portable": "load_model",
    "nlgmoe.surgery.warm_start": "WarmStart",
    "nlgmoe.config": "GPTConfig MoEConfig",
    "nlgmoe.data": "PileDataModule",
    "nlgmoe.distill.mixture_of_students": "MixtureOfStudents",
    "nlgmoe.distill.offline_teacher": "OfflineTeacher",
    "nlgmoe.eval.generation": "generate",
    "nlgmoe.eval.loaded_model": "LoadedModel load_pretrained",
    "nlgmoe.eval.specialisation": "Specialisation count_experts",
    "nlgmoe.experiment": "Experiment load_config",
    "nlgmoe.layers.attention": "AttentionContext",
    "nlgmoe.layers.mla": "MLAConfig",
    "nlgmoe.layers.moe": "MoELayer",
    "nlgmoe.layers.rotary": "Llama3 Yarn",
    "nlgmoe.layers.router": "Router Routing RoutingContext",
    "nlgmoe.layers.routers": "FrozenRouterConfig HashRouterConfig SigmoidRouterConfig UniformRouterConfig",
    "nlgmoe.model.gpt": "GPT GPTOutput",
    "nlgmoe.module": "MoEGPTModule",
    "nlgmoe.parallel.strategy": "ExpertParallelStrategy",
    "nlgmoe.parts": "AttentionConfig ExpertConfig RotaryScaling RouterConfig",
    "nlgmoe.pyramid": "experts_at student_config student_layers",
    "nlgmoe.tools.lm_eval.zero_shot_eval": "ZeroShotEval",
    "nlgmoe.tools.report.write_report": "WriteReport",
}  # module -> its public names
_MODULES = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
