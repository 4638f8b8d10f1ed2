"""Tensors of a family's files and entries of our checkpoints: one table of places for both directions.

A family's table maps each entry, with `#` for a number, to the `Slot`s of its rows. `Layout` fills it in for a model, reads an
entry from the files, or makes a tensor of the entries. One entry or tensor is in memory at a time.

    "blocks.#.ffn_norm.weight": "model.layers.{}.post_attention_layernorm.weight"     a tensor of its own
    "blocks.#.attention.qkv.weight": [Slot(q, rows=query_rows), Slot(k, rows=key_rows), ...]   rows in several tensors
    "blocks.#.moe.experts.#.gate_weight": "model.layers.{}.mlp.experts.{}.gate_proj.weight"    a tensor for each expert
    "blocks.#.moe.experts.#.gate_weight": "model.layers.{}.moe.input_linear.weight"            a stack, [E, ...]
    "blocks.#.moe.experts.#.up_weight": Slot("model.layers.{}.moe.input_linear.weight", part=1)   its rows from F on
    "blocks.#.attention.query.weight": Slot(q, order=even_rows_first)                          rows in another order
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from nlgmoe.checkpoint.entries import Shapes
from nlgmoe.config import GPTConfig
from nlgmoe.surgery.write_weights import weight_shapes

_TABLES = ("token_embedding.weight", "head.weight")  # their rows from `vocab_size` on are padding
_NUMBER = r"(?<=\.)\d+(?=\.)"
Where = tuple[slice, ...]  # an index of a tensor


@dataclass(frozen=True)
class Slot:
    """Rows of an entry in a tensor of a family's files; a row is one output of a linear layer."""

    # Of the tensor, with `{}` for the numbers of block and expert. An expert's entry whose name has no `{}` for the
    # expert is in a stack of all experts, whose first index is the expert.
    name: str
    # Number of rows of the entry; null: all. An entry's slots follow one another.
    rows: Callable[[GPTConfig], int] | None = None
    part: int = 0  # number of parts of as many rows, of other entries, that stand before these rows in the tensor
    # The row of the entry (of these rows, from 0) that each of the tensor's rows is; null: the same order.
    order: Callable[[GPTConfig], Sequence[int]] | None = None
    in_out: bool = False  # the tensor is `[in, out]`; those of `nn.Linear` are `[out, in]`


Slots = str | Slot | Sequence[Slot]  # a name is a slot with the defaults
Table = Mapping[str, Slots]


def query_rows(config: GPTConfig) -> int:
    """Return the number of rows of the queries."""
    return config.num_heads * config.head_size


def key_rows(config: GPTConfig) -> int:
    """Return the number of rows of the keys, and of the values."""
    return config.kv_heads * config.head_size


@dataclass(frozen=True)
class Place:
    """A `Slot` of one model. The entry is transposed first, if it is; "rows" are the tensor's."""

    entry: str  # name of the entry
    tensor: str  # name of the tensor
    first: int  # the entry's first row
    where: Where  # index of these rows in the tensor; in a stack of experts, that of the expert comes first
    order: list[int] | None  # see `Slot`
    transposed: bool  # the entry is `[in, out]` and the tensor `[out, in]`, or the reverse
    shape: torch.Size  # of these rows

    def cut(self, entry: Tensor) -> Tensor:
        """Return these rows of the entry, in the order of the tensor."""
        rows = (entry.t() if self.transposed else entry)[self.first : self.first + self.shape[0]]
        return rows if self.order is None else rows[self.order]

    def restore(self, rows: Tensor) -> Tensor:
        """Return these rows of the tensor in the order of the entry, the inverse of `cut`; not transposed."""
        rows = rows.reshape(self.shape)
        if self.order is None:
            return rows
        value = torch.empty_like(rows)
        value[self.order] = rows
        return value


def _places(config: GPTConfig, table: Table) -> Iterator[Place]:
    """Yield the places of all entries of a model; those of an entry in the order of its rows."""
    orders: dict[Callable[[GPTConfig], Sequence[int]], list[int]] = {}
    for entry, shape in weight_shapes(config).items():
        numbers = re.findall(_NUMBER, entry)
        value = table[re.sub(_NUMBER, "#", entry)]
        first, expert = 0, ".moe.experts." in entry  # an expert's matrices are `[in, out]` in our checkpoints
        for slot in [value] if isinstance(value, str | Slot) else value:
            slot = Slot(slot) if isinstance(slot, str) else slot
            transposed = expert != slot.in_out and len(shape) == 2
            whole = config.vocab_size if entry in _TABLES else shape[-1] if transposed else shape[0]
            rows = whole if slot.rows is None else slot.rows(config)
            where = [slice(slot.part * rows, (slot.part + 1) * rows)]
            if expert and slot.name.count("{}") < len(numbers):
                where.insert(0, slice(int(numbers[-1]), int(numbers[-1]) + 1))
            if slot.order is not None and slot.order not in orders:
                orders[slot.order] = list(slot.order(config))
            order = None if slot.order is None else orders[slot.order]
            size = torch.Size((rows, *(shape[:1] if transposed else shape[1:])))
            yield Place(entry, slot.name.format(*numbers), first, tuple(where), order, transposed, size)
            first += rows


class Layout:
    """The tensors of a model in a family's files, by the family's table."""

    def __init__(self, config: GPTConfig, table: Table) -> None:
        self._config = config
        self.of_entry: dict[str, list[Place]] = {}  # places of each entry, in the order of its rows
        self.of_tensor: dict[str, list[Place]] = {}  # places in each tensor
        for place in _places(config, table):
            self.of_entry.setdefault(place.entry, []).append(place)
            self.of_tensor.setdefault(place.tensor, []).append(place)
        self.shapes: Shapes = {}  # of each tensor
        for name, parts in self.of_tensor.items():
            axes = zip(*(place.where for place in parts), strict=True)
            self.shapes[name] = torch.Size((*(max(part.stop for part in axis) for axis in axes), *parts[0].shape[1:]))

    def entry(self, name: str, read: Callable[[str, Where], Tensor]) -> Tensor:
        """Return an entry; `read(tensor, where)` reads a part of a tensor."""
        parts = self.of_entry[name]
        value = torch.cat([place.restore(read(place.tensor, place.where)) for place in parts])
        value = value.t() if parts[0].transposed else value
        if name in _TABLES:  # padding rows, which no file of Hugging Face's format has
            value = functional.pad(value, (0, 0, 0, self._config.padded_vocab_size - len(value)))
        return value.contiguous()

    def tensor(self, name: str, read: Callable[[str], Tensor], dtype: torch.dtype) -> Tensor:
        """Return a tensor; `read(entry)` reads an entry."""
        value = torch.empty(self.shapes[name], dtype=dtype)
        for place in self.of_tensor[name]:
            value[place.where] = place.cut(read(place.entry)).to(dtype)
        return value


def own_layout(config: GPTConfig) -> Layout:
    """Return the tensors of a folder with our code: names and shapes are the GPT's, and a layer's experts are one tensor."""
    table: dict[str, Slots] = {}
    for entry in weight_shapes(config):
        name = re.sub(_NUMBER, "{}", entry).replace(".experts.{}.", ".experts.")
        name = "lm_head.weight" if entry == "head.weight" else f"model.gpt.{name}"
        table[re.sub(_NUMBER, "#", entry)] = Slot(name, in_out=".experts." in name)
    return Layout(config, table)
