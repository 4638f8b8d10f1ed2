"""The trace of a text: the experts that every token chose in every MoE layer, in one safetensors file.

    experts       [N, L, k]   first choice first, in the smallest integer type
    kept          [N, L, k]   bool; False where dropped over capacity
    weights       [N, L, k]   fp32, on request
    tokens        [N]         int32 ids that the model read, without padding
    next_tokens   [N]         int32 ids that it had to predict
    domain        [N]         int16 index into `domains`
    document      [N]         int32, counted from 0; a document ends at an end-of-document token, or with its sequence
    facts         metadata    `TraceFacts`, as JSON

It is written as the text is read; the memory does not depend on the text's length.

Letters: N tokens, L MoE layers, k experts per token, B sequences of T tokens.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from nlgmoe.batch import Batch
from nlgmoe.config import GPTConfig
from nlgmoe.files import atomic_write
from nlgmoe.layers.routing import Routing
from nlgmoe.pyramid import moe_blocks
from nlgmoe.validation import RunError, SettingError

NAMES = {np.dtype(np.uint8): "U8", np.dtype(np.int16): "I16", np.dtype(np.int32): "I32", np.dtype(np.float32): "F32"}
NAMES[np.dtype(np.bool_)] = "BOOL"  # safetensors' names of types


@dataclass(frozen=True)
class TraceFacts:
    """What a trace is of.

    Attributes:
        blocks: block number of each MoE layer, counted from 0.
        experts: number of experts of each MoE layer.
        num_blocks: of the model.
        domains: names.
        weights_hash: hash of the model's weights (`checkpoint/verify.py`); None: unknown.
        step: optimizer steps that the model had taken; None: unknown.
    """

    blocks: list[int]
    experts: list[int]
    num_blocks: int
    domains: list[str]
    weights_hash: str | None = None
    step: int | None = None

    @classmethod
    def of(cls, config: GPTConfig, domains: list[str], **known: Any) -> TraceFacts:
        """Return the facts of a model; `known`: further ones by name."""
        blocks = moe_blocks(config)
        return cls(list(blocks), list(blocks.values()), config.num_layers, domains, **known)


class Trace:
    """A trace in a file, which is read in parts."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self._file = safe_open(self.path, "numpy")
            self.facts = TraceFacts(**json.loads((self._file.metadata() or {})["facts"]))
            self.num_tokens: int = self._file.get_slice("tokens").get_shape()[0]
        except OSError as error:
            raise SettingError(f"trace={path} cannot be read ({error}); write one with nlgmoe experts") from error
        except Exception as error:  # safetensors' own exception class among them
            raise SettingError(f"trace={path} is no trace ({error!r}); write one with nlgmoe experts") from error

    def read(self, name: str, rows: slice = slice(None)) -> Any:
        """Return some tokens of one of the file's arrays."""
        return self._file.get_slice(name)[rows]

    def experts_of(self, layer: int) -> np.ndarray:
        """Return the choices in a MoE layer, `[N, k]`."""
        chosen: np.ndarray = self._file.get_slice("experts")[:, layer]
        return chosen


class TraceWriter:
    """Writes a trace; the file exists when the context ends without an error.

        with TraceWriter(path, facts, eod_id) as writer:
            for batch in batches:
                writer.add(batch, model(batch["tokens"], token_mask_or_none(batch)).routings)

    Args:
        eod_id: id of the end-of-document token, at which documents begin.
        weights: write the experts' weights too.

    Attributes:
        num_tokens: tokens written so far.
    """

    def __init__(self, path: str | Path, facts: TraceFacts, eod_id: int, weights: bool = False) -> None:
        self.path, self.facts, self.weights, self._eod_id = Path(path), facts, weights, eod_id
        self._dtype = torch.uint8 if max(facts.experts) <= 256 else torch.int16
        # name -> file, type, shape of a token's entry
        self._arrays: dict[str, tuple[IO[bytes], np.dtype, tuple[int, ...]]] = {}
        self.num_tokens, self._documents, self._stack = 0, 0, ExitStack()

    def __enter__(self) -> TraceWriter:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(dir=self.path.parent, prefix=".trace-")
        self._folder = Path(self._stack.enter_context(temporary))
        return self

    def add(self, batch: Batch, routings: Sequence[Routing]) -> None:
        """Append a batch, which may be on any device: one copy from that of the routings."""
        real = batch["token_mask"].cpu().numpy()  # [B, T]
        tokens, targets = batch["tokens"].cpu().numpy(), batch["targets"].cpu().numpy()
        starts = tokens == self._eod_id
        starts[:, 0] = True
        documents = self._documents + np.cumsum(starts).reshape(starts.shape) - 1
        domain = np.broadcast_to(batch["domain"].cpu().numpy()[:, None], real.shape) * (len(self.facts.domains) > 1)
        self._documents += int(starts.sum())
        self.num_tokens += int(real.sum())
        self._write("tokens", tokens[real].astype(np.int32))
        self._write("next_tokens", targets[real].astype(np.int32))
        self._write("document", documents[real].astype(np.int32))
        self._write("domain", domain[real].astype(np.int16))
        for name, values in self._choices(routings).items():
            self._write(name, values[real.flatten()])

    @torch.no_grad()
    def _choices(self, routings: Sequence[Routing]) -> dict[str, np.ndarray]:
        """Return the routings' arrays, `[B * T, L, k]`."""
        columns = {"experts": torch.stack([routing.expert for routing in routings], 1).to(self._dtype)}
        columns["kept"] = torch.stack([routing.kept for routing in routings], 1)
        if self.weights:
            columns["weights"] = torch.stack([routing.weight for routing in routings], 1).float()
        shape = columns["experts"].shape
        data = torch.cat([_bytes(column) for column in columns.values()]).cpu().numpy()  # one copy from the device
        arrays, begin = {}, 0
        for name, column in columns.items():
            size = column.numel() * column.element_size()
            dtype = np.dtype(str(column.dtype).removeprefix("torch."))
            arrays[name] = data[begin : begin + size].view(dtype).reshape(shape)
            begin += size
        return arrays

    def _write(self, name: str, values: np.ndarray) -> None:
        if name not in self._arrays:
            file = self._stack.enter_context((self._folder / name).open("w+b"))
            self._arrays[name] = (file, values.dtype, values.shape[1:])
        self._arrays[name][0].write(np.ascontiguousarray(values).data)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._stack:
            if kind is not None:
                return
            if not self.num_tokens:
                raise SettingError("text: there is no token to route; give some text")
            try:
                with atomic_write(self.path) as temporary, temporary.open("wb") as file:
                    self._join(file)
            except OSError as failed:
                raise RunError(f"{self.path} cannot be written ({failed.strerror}); make room") from failed

    def _join(self, file: IO[bytes]) -> None:
        """Write safetensors: the length of the header, the header, and the arrays, those of the widest types first."""
        header: dict[str, Any] = {"__metadata__": {"facts": json.dumps(asdict(self.facts))}}
        arrays, end = sorted(self._arrays.items(), key=lambda item: -item[1][1].itemsize), 0
        for name, (_, dtype, shape) in arrays:
            begin, end = end, end + self.num_tokens * dtype.itemsize * int(np.prod(shape, dtype=np.int64))
            header[name] = {"dtype": NAMES[dtype], "shape": [self.num_tokens, *shape], "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        file.write(len(text).to_bytes(8, "little") + text)
        for _, (array, _, _) in arrays:
            array.seek(0)
            shutil.copyfileobj(array, file, 2**20)


def _bytes(column: Tensor) -> Tensor:
    return column.contiguous().flatten().view(torch.uint8)
