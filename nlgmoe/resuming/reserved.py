"""Names in a checkpoint that callbacks cannot use."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

# What is written beside Lightning's entries
RESERVED = {
    *("format", "version", "versions", "saved_at", "path", "optimizer_groups", "loss_scale"),
    *("model_config", "tokens_seen", "step_samples", "non_finite", "seed", "started_from", "tokenizer", "distiller"),
    *("fit", "monitored", "validation_due", "unseen", "micro_batches_after_step"),
}


def require_free(checkpoint: dict[str, Any], names: Set[str]) -> None:
    """Check, before they are written, that no callback has stored something under one of `names`.

    Raises:
        ValueError: one has.
    """
    if taken := names & checkpoint.keys():
        raise ValueError(
            f"a callback, or the module, has stored checkpoint[{min(taken)!r}] in on_save_checkpoint, which nlgmoe writes: "
            "store it under another name"
        )
