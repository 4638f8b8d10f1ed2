"""`GPT` with the interface of `transformers`. An exported folder contains this file and all that it imports.

Letters in shape comments: B sequences, T new positions, S positions in all (cached + new), H hidden size, V vocabulary.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.utils.generic import can_return_tuple

from nlgmoe.layers.attention import KVCache, positions_of
from nlgmoe.layers.balance import add_router_losses
from nlgmoe.layers.experts import Experts
from nlgmoe.layers.router import Router
from nlgmoe.model.gpt import GPT, Block
from nlgmoe.tools.hugging_face.configuration_nlgmoe import NlgmoeConfig

_FIXED_SIZE = "cache_implementation=static, of fixed size, is not supported; use a growing cache such as DynamicCache"
# Arguments of other models: the value that changes nothing, and why others are refused.
_REFUSED = {
    "output_attentions": (False, "fused attention does not compute weights"),
    "token_type_ids": (None, "the model has no types of tokens"),
    "is_causal": (True, "the model attends to earlier positions"),
}


class NlgmoeBlock(Block, GradientCheckpointingLayer):
    """A block that `gradient_checkpointing_enable` reaches."""


class _GPT(GPT):
    block_class = NlgmoeBlock


@dataclass
class NlgmoeModelOutput(MoeModelOutputWithPast):
    """The output of `NlgmoeModel`."""

    # Sum of the routers' losses with their coefficients, divided by the balance loss's (if that is not 0), a scalar;
    # None in evaluation without `output_router_logits`, and in a dense model.
    aux_loss: Tensor | None = None


class NlgmoePreTrainedModel(PreTrainedModel):
    """What the classes of this file have in common."""

    config_class = NlgmoeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["NlgmoeBlock"]  # noqa: RUF012 (declared by `transformers`)

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise parameters that a folder lacks; `GPT` has initialised those of a new model."""
        super()._init_weights(module)
        if isinstance(module, Experts | Router):
            for name, parameter in module.named_parameters(recurse=False):
                if name.endswith("bias"):
                    nn.init.zeros_(parameter)
                else:
                    nn.init.normal_(parameter, std=self.config.init_std)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Any = None, **kwargs: Any) -> None:
        """Recompute the blocks in the backward pass."""
        if self.config.moe is not None and (gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            reason = "the routers' losses would get no gradient; set it to False"
            raise ValueError(f"use_reentrant=True is not supported: {reason}")
        super().gradient_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)


class NlgmoeModel(NlgmoePreTrainedModel):
    """A `GPT`, from tokens to hidden states, with the interface of `transformers`. Its tables have no padding rows."""

    def __init__(self, config: NlgmoeConfig) -> None:
        super().__init__(config)
        settings = replace(config.gpt_config(), tied_embeddings=True, vocab_size_multiple=1)  # it has no head
        self.gpt: GPT = _GPT(settings, seed=torch.initial_seed())
        for parameter in self.gpt.parameters():
            if not parameter.is_meta:
                parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # by GPT
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding."""
        return self.gpt.token_embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        assert isinstance(value, nn.Embedding)
        self.gpt.token_embedding = value

    def _or_of_config(self, given: bool | None, name: str) -> bool:
        """Return a setting of a call; where it is not given, that of the configuration, as `from_pretrained` sets it."""
        return bool(getattr(self.config, name, None) if given is None else given)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> NlgmoeModelOutput:
        """Run the model; return a tuple if `return_dict=False` is passed or configured.

        Args:
            input_ids: `[B, T]`; with a cache, only the new tokens.
            attention_mask: `[B, S]`, 0 at padding, which may be anywhere; positions are counted from it.
            position_ids: `[1 or B, T]`: the positions that the model counts itself, or positions that begin again at 0, each
                time a new document: it gets the result that it has alone.
            cache: a growing cache of `transformers`, such as `DynamicCache`.
            inputs_embeds: `[B, T, H]`, in place of `input_ids`.
            use_cache: return a cache; a new one if none is given. Documents and recomputed blocks have none.
            output_hidden_states: return the input of the first block and the output of each, the last after the final norm.
            output_router_logits: return the gates' logits, `[B * T, E]` for each MoE layer, and `aux_loss`.
            past_key_values: the name of `cache` in earlier versions.
            kwargs: ignored, but for arguments that would change the result; documents that other kernels read from
                `cu_seq_lens_q` or `seq_idx` must be in `position_ids` too.

        Raises:
            ValueError: an argument, named with its value, is one that this model does not compute.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass either input_ids or inputs_embeds")
        cache = cache if cache is not None else past_key_values
        cached = 0 if cache is None else int(cache.get_seq_length())
        tokens = inputs_embeds[..., 0] if input_ids is None else input_ids  # type: ignore[index]
        batch, new = tokens.shape
        asked = self._or_of_config(kwargs.get("output_attentions"), "output_attentions")
        _refuse(kwargs | {"output_attentions": asked}, position_ids)
        mask = _token_mask(attention_mask, batch, cached + new)
        documents = None if position_ids is None else _documents(position_ids, mask, batch, new, cached)

        cache = self._cache_to_use(cache, use_cache, has_documents=documents is not None)
        with _block_inputs(self.gpt, self._or_of_config(output_hidden_states, "output_hidden_states")) as states:
            view = None if cache is None else _CacheView(cache, mask)
            new_mask = None if mask is None else mask[:, -new:]
            output = self.gpt(tokens, new_mask, view, documents=documents, embedded=inputs_embeds)

        moe, aux_loss = self.gpt.config.moe, None
        returns_logits = self._or_of_config(output_router_logits, "output_router_logits")
        if moe is not None and (returns_logits or self.training):
            zero = torch.zeros((), dtype=torch.float32, device=output.hidden.device)
            aux_loss = add_router_losses(zero, moe, output.routings)[0] / (moe.loss_coeff or 1.0)
        return NlgmoeModelOutput(
            last_hidden_state=output.hidden,
            hidden_states=(*states, output.hidden) if states else None,
            router_logits=tuple(routing.logits for routing in output.routings) if returns_logits else None,
            aux_loss=aux_loss,
            cache=cache,
        )

    def _cache_to_use(self, cache: Any, use_cache: bool | None, has_documents: bool) -> Any:
        """Return the cache, or a new one if it is wanted; documents and recomputed blocks have none."""
        recomputes = self.is_gradient_checkpointing and self.training and torch.is_grad_enabled()
        if recomputes or has_documents:
            if cache is not None:
                what = "gradient checkpointing, which would extend it twice" if recomputes else "several documents"
                raise ValueError(f"a cache does not go with {what}; set use_cache=False")
            return None
        return DynamicCache() if cache is None and self._or_of_config(use_cache, "use_cache") else cache


class NlgmoeForCausalLM(NlgmoePreTrainedModel, GenerationMixin):
    """`NlgmoeModel` and a head: `from_pretrained`, `generate`, `save_pretrained`, a loss for labels.

    In evaluation mode the loss is the cross-entropy. In training mode, as in pre-training, the routers' losses are added,
    `config.router_aux_loss_coef * aux_loss`, and tokens over capacity may be dropped. With `aux_scope` global, that is a
    collective of all ranks. `output_router_logits`, of a call or the configuration, adds them in evaluation too, as in Mixtral.
    A trainer that computes its own loss from `logits` or `last_hidden_state` must add them itself.
    """

    _tied_weights_keys = {"lm_head.weight": "model.gpt.token_embedding.weight"}  # noqa: RUF012 (declared by `transformers`)

    def __init__(self, config: NlgmoeConfig) -> None:
        super().__init__(config)
        self.model = NlgmoeModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Run the model; return a tuple if `return_dict=False` is passed or configured. See `NlgmoeModel` for other arguments.

        Args:
            labels: `[B, T]`, usually `input_ids` (they are shifted here); -100 is ignored.
            logits_to_keep: number of last positions, or indices of positions, to compute logits of; 0: all.
            kwargs: other arguments of `NlgmoeModel`, and of the loss function, such as `num_items_in_batch`: the labels of all
                micro-batches of a step. The loss is divided by it, and `aux_loss` is weighted by this micro-batch's share.
        """
        inputs = (input_ids, attention_mask, position_ids, cache, inputs_embeds)
        outputs: NlgmoeModelOutput = self.model(*inputs, **kwargs | {"return_dict": True})
        hidden = outputs.last_hidden_state
        assert hidden is not None
        hidden = hidden[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else hidden[:, logits_to_keep]
        logits = self.lm_head(hidden)  # [B, T or less, V]
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
            if outputs.aux_loss is not None:
                weight = self.config.router_aux_loss_coef * _share_of_step(labels, **kwargs)
                loss = loss + weight * outputs.aux_loss.to(loss.device)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=outputs.aux_loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            router_logits=outputs.router_logits,
            cache=outputs.cache,
        )


class _CacheView(KVCache):
    """Adapter of a cache of `transformers`, which keeps the tensors and reorders beams, to `KVCache`."""

    def __init__(self, cache: Any, mask: Tensor | None) -> None:
        super().__init__(max_len=sys.maxsize)
        self._cache = cache
        self.length = int(cache.get_seq_length())
        self.mask = None if mask is None else mask[:, : self.length]

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Extend a layer's cache; see `KVCache`."""
        keys, values = self._cache.update(k, v, layer)
        if keys.shape[2] != self.length:
            raise ValueError(_FIXED_SIZE)
        return keys, values


def _token_mask(attention_mask: Tensor | None, batch: int, positions: int) -> Tensor | None:
    """Return a bool mask `[B, S]`, False at padding; None without padding."""
    if attention_mask is None:
        return None
    if attention_mask.dim() == 4:
        raise ValueError(_FIXED_SIZE)  # `generate` makes 4-dimensional masks for caches of fixed size
    if attention_mask.shape != (batch, positions):
        expected = f"[sequences, cached + new positions] = {[batch, positions]}"
        raise ValueError(f"attention_mask is {list(attention_mask.shape)}, not {expected}")
    mask = attention_mask.bool()
    return None if not torch.compiler.is_compiling() and mask.all() else mask


def _documents(position_ids: Tensor, mask: Tensor | None, batch: int, new: int, cached: int) -> Tensor | None:
    """Return the document of each new position, `[B, T]`; None if the positions are those of one document.

    `position_ids` `[1 or B, T]` count on, or begin again at 0; at padding, where `mask` `[B, S]` is False, they are not read.
    """
    if position_ids.shape not in ((1, new), (batch, new)):
        raise ValueError(f"position_ids is {list(position_ids.shape)}, not [1 or {batch}, {new}]")
    given = position_ids.expand(batch, new)
    counts = torch.ones_like(given, dtype=torch.bool) if mask is None else mask[:, cached:]
    several = ((given == 0) & counts).cumsum(dim=1)
    for documents in (None, several) if cached == 0 else (None,):
        differs = (given != positions_of(mask, new, cached, given.device, documents)) & counts
        if not differs.any():
            return documents
    row, column = differs.nonzero()[0].tolist()
    raise ValueError(
        f"position_ids[{row}, {column}]={int(given[row, column])} is not supported: positions count tokens from 0, and may "
        "begin again at 0 in a call without a cache; leave position_ids out"
    )


def _refuse(given: dict[str, Any], position_ids: Tensor | None) -> None:
    """Refuse arguments that would change the result; documents are read from `position_ids` `[1 or B, T]`."""
    given = {name: value for name, value in given.items() if value is not None}
    for name, (harmless, reason) in _REFUSED.items():
        if given.get(name, harmless) is not harmless:
            raise ValueError(f"{name}={given[name]} is not supported: {reason}; leave it out")
    documents = sorted(given.keys() & {"cu_seq_lens_q", "cu_seq_lens_k", "seq_idx"})
    if documents and position_ids is None:
        raise ValueError(f"{documents[0]} is not supported: pass position_ids that begin again at 0 in each document")


def _share_of_step(
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | float:
    """Return the share of the step's labels that are in this micro-batch, so that the shares of a step add up to 1."""
    if num_items_in_batch is None:
        return 1.0
    counted = (labels[:, 1:] if shift_labels is None else shift_labels) != ignore_index
    return counted.sum() / num_items_in_batch


@contextmanager
def _block_inputs(model: GPT, wanted: bool) -> Iterator[list[Tensor]]:
    """Collect the input of each block, `[B, T, H]`, while the model runs; nothing if not wanted."""
    states: list[Tensor] = []
    blocks = model.blocks if wanted else ()
    handles = [block.register_forward_pre_hook(lambda module, inputs: states.append(inputs[0])) for block in blocks]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()
