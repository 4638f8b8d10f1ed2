"""Compare model, seed and tokenizer of a checkpoint with those of the run that reads it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nlgmoe.checkpoint.reading import read_tokenizer
from nlgmoe.config import GPTConfig
from nlgmoe.data.model_files import TokenizerFiles
from nlgmoe.data.tokenizer import Tokenizer
from nlgmoe.data.training_data import TrainingData
from nlgmoe.parts import ROUTER_FIELDS
from nlgmoe.validation import RunError, SettingError, list_differences, require

# Fields of the model's configuration that may differ from the checkpoint's in evaluation.
IGNORED_IN_EVALUATION = ROUTER_FIELDS - {"groups", "normalize_weights", "gate_scale"}
IGNORED_IN_EVALUATION |= {"hidden_dropout", "attention_dropout", "init_std"}


def check_same_run(checkpoint: dict[str, Any], config: GPTConfig, seed: int | None, path: Any) -> None:
    """Check that a checkpoint belongs to this model and, in training, to this run.

    Args:
        seed: seed of this run; None in evaluation, which ignores settings that only affect training.
    """
    resumes = seed is not None
    if resumes and "callbacks" not in checkpoint:  # `ModelCheckpoint(save_weights_only=True)`
        raise SettingError(
            f"{path} holds weights only: start a new run from it with model.warm_start.checkpoint={path}"
        )
    ignored = frozenset() if resumes else IGNORED_IN_EVALUATION
    if not resumes and config.moe is not None and config.moe.router is not None:
        ignored |= config.moe.router.ignored_in_evaluation
    saved = GPTConfig.from_dict(checkpoint["model_config"]).to_dict()  # fields that it lacks get their defaults
    if different := list_differences(saved, config.to_dict(), ignored):
        shorter = "; data.seq_len makes sequences shorter" if saved["seq_len"] != config.seq_len else ""
        raise SettingError(
            f"the checkpoint's model differs from model.config: {', '.join(different)}; set model.config as the run had it"
            + shorter
        )
    if resumes and checkpoint["seed"] != seed:
        raise SettingError(f"the checkpoint's run has model.seed {checkpoint['seed']}, not {seed}; set it to resume")


def check_moments(checkpoint: dict[str, Any], frozen: Sequence[str], muon: bool) -> None:
    """Check that a checkpoint has the moments that this run needs: of the components that it trains, of its optimizer."""
    now, before = sorted(frozen), checkpoint.get("frozen", [])
    require(
        now == before,
        f"model.optimizer.frozen={now} was {before} in the checkpoint's run, which has moments of the other components only; set "
        "it as it was, or start a new run with model.warm_start",
    )
    setting, used = ("{}", "AdamW alone") if muon else ("null", "Muon")
    require(
        muon == checkpoint.get("muon", False),
        f"model.optimizer.muon={setting}: the checkpoint's run had {used}, which has other moments; set it as it was, or start a "
        "new run with model.warm_start",
    )


def check_tokenizer(checkpoint: dict[str, Any], data: TrainingData | None) -> None:
    """Check the tokenizer of a checkpoint without a data module's state; with it, the data module compares the tokenizer."""
    if data is None or type(data).__qualname__ in checkpoint:
        return
    if data.tokenizer is not None and not tokenizer_matches(data.tokenizer.files, checkpoint["path"]):
        raise RunError(
            f"{checkpoint['path']} has another tokenizer than data.tokenizer; set it to that of the checkpoint"
        )


def tokenizer_matches(tokenizer: TokenizerFiles, path: str | Path) -> bool:
    """Return True if `tokenizer` has the same ids as the checkpoint's, or the checkpoint has none."""
    stored = read_tokenizer(path)
    if stored is None or stored == tokenizer:
        return True
    return Tokenizer.from_files(tokenizer, "of the run").has_same_ids(Tokenizer.from_files(stored, "of the checkpoint"))
