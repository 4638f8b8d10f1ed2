"""Settings of a model that have no effect: they are allowed, so that YAML files combine, and named."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, fields
from typing import Any

from nlgmoe.config import GPTConfig, MoEConfig


def without_effect(config: GPTConfig) -> str:
    """Return a line of the settings of a model that differ from their defaults and have no effect, with reasons; or nothing."""
    settings = [*_of_model(config), *(() if config.moe is None else _of_experts(config.moe))]
    return f"model.config has settings without effect: {'; '.join(settings)}" if settings else ""


def _of_model(config: GPTConfig) -> Iterator[str]:
    if config.rope_theta is None:
        yield from _set(config, "without rope_theta", "rotary_dim", "rotary_scaling")
    if config.attention is not None:
        yield from _set(config, f"with {type(config.attention).__name__}", *sorted(config.attention.unread_fields))


def _of_experts(moe: MoEConfig) -> Iterator[str]:
    unread: frozenset[str] = frozenset()
    if moe.router is not None:
        unread = moe.router.unread_fields
        yield from _set(moe, f"with {type(moe.router).__name__}", *sorted(unread), prefix="moe.")
    drops = "token_dropping" not in unread and moe.token_dropping
    conditions = (
        (moe.mlp_type == "residual", "with mlp_type=standard", ("shared_ffn_size", "residual_mix")),
        (drops, "without token_dropping", ("train_capacity_factor",)),
        (moe.eval_token_dropping, "without eval_token_dropping", ("eval_capacity_factor",)),
        (drops or moe.eval_token_dropping, "without token_dropping", ("min_capacity",)),
        (drops and moe.top_k == 1, "unless top_k is 1 and tokens are dropped", ("random_token_selection",)),
        (moe.top_k == 2, "unless top_k is 2", ("second_expert",)),
        (moe.loss_coefficients[0] > 0, "without a balance loss", ("aux_scope",)),
    )
    for holds, reason, names in conditions:
        if not holds:
            yield from _set(moe, reason, *(name for name in names if name not in unread), prefix="moe.")


def _set(settings: Any, reason: str, *names: str, prefix: str = "") -> Iterator[str]:
    """Yield those fields of a configuration that differ from their defaults."""
    defaults = {field.name: field.default for field in fields(settings)}
    for name in names:
        if (value := getattr(settings, name)) != defaults[name] and defaults[name] is not MISSING:
            yield f"{prefix}{name}={value} ({reason})"
