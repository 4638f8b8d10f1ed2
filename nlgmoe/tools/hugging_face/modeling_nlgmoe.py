"""`GPT` with the interface of `transformers`. An exported folder contains this file and all that it imports.

Letters in shape comments: B sequences, T new positions, S positions in all (cached + new), H hidden size, V vocabulary.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from nlgmoe.layers.attention import KVCache
from nlgmoe.layers.balance import add_router_losses
from nlgmoe.layers.experts import Experts
from nlgmoe.layers.router import Router
from nlgmoe.model.gpt import GPT
from nlgmoe.tools.hugging_face.configuration_nlgmoe import NlgmoeConfig

# The field of the cache in the outputs of `transformers`: the second name before 5.24.
CACHE = next(f.name for f in fields(MoeCausalLMOutputWithPast) if f.name in ("cache", "past_key_values"))
_FIXED_SIZE = (
    "cache_implementation=static, a cache of fixed size, is not supported; use a growing cache such as DynamicCache"
)


class NlgmoeForCausalLM(PreTrainedModel, GenerationMixin):
    """`GPT` with the interface of `transformers`: `from_pretrained`, `generate`, `save_pretrained`, a loss for labels.

    In evaluation mode the loss is the cross-entropy. In training mode, as in pre-training, the balance losses of the MoE
    layers are added, and tokens over capacity may be dropped. With `aux_scope` global, that is a collective of all ranks.
    """

    config_class = NlgmoeConfig
    base_model_prefix = "model"
    _input_embed_layer = "token_embedding"  # its rows from `vocab_size` on are padding
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["Block"]  # noqa: RUF012 (declared by `transformers`)

    def __init__(self, config: NlgmoeConfig) -> None:
        super().__init__(config)
        self.gradient_checkpointing = False  # `gradient_checkpointing_enable` sets it
        self.model = GPT(config.gpt_config(), seed=torch.initial_seed())
        for parameter in self.model.parameters():
            if not parameter.is_meta:
                parameter._is_hf_initialized = True  # by GPT
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise parameters that a folder lacks; `GPT` has initialised those of a new model."""
        super()._init_weights(module)
        if isinstance(module, Experts | Router):
            for name, parameter in module.named_parameters(recurse=False):
                if name.endswith("bias"):
                    nn.init.zeros_(parameter)
                else:
                    nn.init.normal_(parameter, std=self.model.config.init_std)

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the head; None if it is the token embedding."""
        return self.model.head

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the head, if it is not the token embedding."""
        assert isinstance(value, nn.Linear)
        self.model.head = value

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Resize the token embedding as `transformers` does; afterwards it has no padding rows."""
        table = super().resize_token_embeddings(*args, **kwargs)
        if table.num_embeddings == self.config.vocab_size:
            self.config.vocab_size_multiple = 1
            self.model.config = replace(self.model.config, vocab_size=table.num_embeddings, vocab_size_multiple=1)
        return table

    def _or_of_config(self, given: bool | None, name: str) -> bool | None:
        """Return a setting of a call; where it is not given, that of the configuration, as `from_pretrained` sets it."""
        return getattr(self.config, name, None) if given is None else given

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        output_attentions: bool | None = None,
        past_key_values: Any = None,
    ) -> MoeCausalLMOutputWithPast:
        """Run the model; return a tuple if `return_dict=False` is passed or configured.

        Args:
            input_ids: `[B, T]`; with a cache, only the new tokens.
            attention_mask: `[B, S]`, 0 at padding, which may be anywhere; positions are counted from it.
            cache: a growing cache of `transformers`, such as `DynamicCache`.
            labels: `[B, T]`, usually `input_ids` (they are shifted here); -100 is ignored.
            use_cache: return a cache; a new one if none is given.
            logits_to_keep: number of last positions, or indices of positions, to compute logits of; 0: all.
            output_hidden_states: return the input of the first block and the output of each, the last after the final norm.
            output_router_logits: return the gates' logits, `[B * T, E]` for each MoE layer.
            output_attentions: not supported.
            past_key_values: the name of `cache` in earlier versions.
        """
        output_hidden_states = self._or_of_config(output_hidden_states, "output_hidden_states")
        output_router_logits = self._or_of_config(output_router_logits, "output_router_logits")
        if self._or_of_config(output_attentions, "output_attentions"):
            raise ValueError(
                "output_attentions=True is not supported: fused attention does not compute weights; leave it out"
            )
        cache = cache if cache is not None else past_key_values
        if cache is None and use_cache:
            cache = DynamicCache()
        mask = _token_mask(attention_mask, input_ids, 0 if cache is None else int(cache.get_seq_length()))
        with _block_outputs(self.model, bool(output_hidden_states)) as states:
            self.model.activation_checkpointing = self.gradient_checkpointing and self.training
            view = None if cache is None else _CacheView(cache, mask)
            new_mask = None if mask is None else mask[:, -input_ids.shape[1] :]
            output = self.model(input_ids, token_mask=new_mask, cache=view)
        hidden = (
            output.hidden[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else output.hidden[:, logits_to_keep]
        )
        logits = self.model.logits(hidden.to(self.model.token_embedding.weight.device))  # [B, T or less, V]
        loss = aux_loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.model.config.vocab_size)
            if self.training and self.model.config.moe is not None:
                aux_loss, _ = add_router_losses(loss.new_zeros(()), self.model.config.moe, output.routings)
                loss = loss + aux_loss
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            hidden_states=(*states[:-1], output.hidden) if states else None,
            router_logits=tuple(routing.logits for routing in output.routings) if output_router_logits else None,
            **{CACHE: cache},
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


def _token_mask(attention_mask: Tensor | None, tokens: Tensor, cached: int) -> Tensor | None:
    """Return a bool mask `[B, S]`, False at padding; None without padding."""
    if attention_mask is None:
        return None
    if attention_mask.dim() == 4:
        raise ValueError(_FIXED_SIZE)  # `generate` makes 4-dimensional masks for caches of fixed size
    expected = (tokens.shape[0], cached + tokens.shape[1])
    if attention_mask.shape != expected:
        raise ValueError(
            f"attention_mask is {list(attention_mask.shape)}, not [sequences, cached + new positions] = {list(expected)}"
        )
    mask = attention_mask.bool()
    return None if mask.all() else mask


@contextmanager
def _block_outputs(model: GPT, wanted: bool) -> Iterator[list[Tensor]]:
    """Collect the input of the first block and the output of each, `[B, T, H]`, while the model runs; nothing if not wanted."""
    states: list[Tensor] = []
    handles = []
    if wanted:
        handles.append(model.dropout.register_forward_hook(lambda module, inputs, output: states.append(output)))
        for block in model.blocks:
            handles.append(block.register_forward_hook(lambda module, inputs, output: states.append(output[0])))
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()
