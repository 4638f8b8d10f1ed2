"""Ranks: experts divided over 2 and 3 processes give the numbers of one process."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor, distributed, multiprocessing, nn

from nlgmoe.tools.check.layer import Batch, Failed, Layer, NotApplicable, gradients, require_close
from nlgmoe.tools.check.own import OwnLayer

WORLDS = (2, 3)


def ranks_equal_one_process(layer: Layer) -> str:
    """Compare outputs and averaged gradients of 2 and of 3 gloo ranks with those of one process.

    By default of one that accumulates the ranks' micro-batches; dropless with `aux_scope: global`, of one with the whole batch.
    """
    if not isinstance(layer, OwnLayer):
        raise NotApplicable("the layer does not declare how its experts are divided over ranks")
    placed = layer.on_ranks()
    if scalars := [name for name, parameter in placed.make().named_parameters() if parameter.dim() == 0]:
        raise Failed(f"{scalars[0]} has no dimension: DeepSpeed cannot send it to other ranks; give it the shape [1]")
    if not distributed.is_available() or not distributed.is_gloo_available():
        raise NotApplicable("PyTorch has no gloo")
    with tempfile.TemporaryDirectory() as folder:
        try:
            multiprocessing.spawn(_rank, (layer, Path(folder)), nprocs=max(WORLDS), daemon=True)
        except Exception as error:
            files = sorted(Path(folder).glob("*.failed"), key=lambda file: file.stat().st_mtime_ns)
            if not files:
                raise
            raise Failed(files[0].read_text(encoding="utf-8")) from error  # the other ranks fail as a consequence
    return f"2 and 3 ranks, one process with {'their micro-batches' if placed.accumulates else 'the whole batch'}"


def _rank(rank: int, layer: OwnLayer, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    for ranks in (world for world in WORLDS if rank < world):
        try:
            _compare(layer, rank, ranks, folder)
        except Exception as error:
            kind = "" if isinstance(error, Failed) else f"{type(error).__name__}: "
            reason = " ".join(f"{ranks} ranks, rank {rank}: {kind}{error}".split())[:200]
            (folder / f"{ranks}-{rank}.failed").write_text(reason, encoding="utf-8")
            os._exit(1)  # the other ranks may wait in a collective


def _compare(layer: OwnLayer, rank: int, ranks: int, folder: Path) -> None:
    placed = layer.on_ranks()
    whole, batch = placed.make(), Batch.random(placed, 2 * ranks, 8)
    parts = [batch.sequences(slice(2 * part, 2 * part + 2)) for part in range(ranks)]
    if placed.accumulates:
        runs = [_step(placed, whole, part, seed) for seed, part in enumerate(parts)]
        y = runs[rank][0]
        expected = {name: torch.stack([grads[name] for _, grads in runs]).mean(0) for name in runs[0][1]}
    else:
        y, expected = _step(placed, whole, batch, 0)
        y = y[2 * rank : 2 * rank + 2]
    store = distributed.FileStore(str(folder / f"store-{ranks}"), ranks)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    try:
        actual, grads = _step(placed, placed.build_on_rank(whole), parts[rank], rank)
        require_close("output", actual, y, 1e-6)
        for name, gradient in grads.items():
            wanted = expected[name]
            if gradient.shape == wanted.shape:
                distributed.all_reduce(gradient)
            else:  # a rank's experts have seen the tokens of all ranks
                wanted = wanted[rank * len(gradient) : (rank + 1) * len(gradient)]
            require_close(f"gradient of {name}", gradient / ranks, wanted, 1e-6)
        distributed.barrier()
    finally:
        distributed.destroy_process_group()


def _step(layer: Layer, module: nn.Module, batch: Batch, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    output = layer.run(module, batch, seed)
    loss = output.y.square().mean() + (0 if output.aux is None else output.aux)
    return output.y.detach(), gradients(module, loss)
