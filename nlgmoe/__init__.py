"""nlgmoe: mixture-of-experts language models on PyTorch Lightning.

The names below are the public interface. Each is imported at its first use, by this list: `import nlgmoe` is fast, and changes
nothing in the process.
"""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
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
    from nlgmoe.pyramid import experts_at, student_layers
    from nlgmoe.surgery.warm_start import WarmStart
    from nlgmoe.tools.lm_eval.zero_shot_eval import ZeroShotEval
    from nlgmoe.tools.report.write_report import WriteReport

_SOURCE = ast.parse(Path(__file__).read_text(encoding="utf-8"))
_IMPORTS = [n for n in ast.walk(_SOURCE) if isinstance(n, ast.ImportFrom) and str(n.module).startswith("nlgmoe.")]
_MODULES = {alias.name: str(node.module) for node in _IMPORTS for alias in node.names}  # public name -> its module
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
