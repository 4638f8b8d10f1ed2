"""The training loss of one micro-batch, and the window of micro-batches that one optimizer step accumulates.

    loss = CE + beta * T^2 * KL(teacher || student) + loss_coeff * balance + z_loss_coeff * z + the routers' own

Cross-entropy and KL divide by the mean number of counted tokens of a rank, so that the mean over ranks is the loss of the whole
batch.
"""

from __future__ import annotations

import torch
from torch import Tensor, distributed

from nlgmoe.batch import Batch, loss_mask, token_mask_or_none
from nlgmoe.device import fork_rng
from nlgmoe.distill.distiller import Distiller
from nlgmoe.layers.balance import add_router_losses
from nlgmoe.layers.losses import cross_entropy, distilled_cross_entropy
from nlgmoe.layers.moe import moe_layers
from nlgmoe.layers.router import Routing
from nlgmoe.model.gpt import GPT, NoiseKey
from nlgmoe.seeding import derive_seed
from nlgmoe.validation import RunError


def training_loss(
    gpt: GPT, batch: Batch, noise_key: NoiseKey, chunk_size: int, distiller: Distiller | None = None
) -> tuple[Tensor, dict[str, Tensor], list[Routing]]:
    """Compute the loss of one micro-batch; a second call with the same arguments computes the same.

    Args:
        gpt: the model.
        batch: the micro-batch of this rank.
        noise_key: (seed, step, micro-batch index over all ranks) of every random draw.
        chunk_size: tokens whose logits exist at a time.
        distiller: reads the teacher; None, or a stage that has ended: no distillation.

    Returns:
        The loss, its parts by logged name without their coefficients, and the routing of each MoE layer.
    """
    mask, moe = token_mask_or_none(batch), gpt.config.moe
    # The teacher first: its activations are freed before the student's are allocated.
    teacher = distiller.read(batch, mask) if distiller is not None else None
    with fork_rng(batch["tokens"].device):  # dropout draws from torch's generator: seed it for this micro-batch alone
        torch.manual_seed(derive_seed("dropout", *noise_key))
        output = gpt(batch["tokens"], mask, noise_key=noise_key, documents=batch.get("document"))
    counted = loss_mask(batch)
    arguments = (
        output.hidden.flatten(0, 1),
        gpt.unembedding,
        gpt.config.vocab_size,
        batch["targets"].flatten(),
        counted.flatten(),
        chunk_size,
        mean_over_ranks(counted.sum().float()),
    )
    if teacher is None:
        loss = cross_entropy(*arguments)
        parts = {"train/loss": loss}
    else:
        distilled = distilled_cross_entropy(*arguments, teacher)
        loss = distilled.loss
        parts = {
            "train/loss": distilled.language,
            "train/distillation_loss": distilled.distillation,
            "train/teacher_agreement": distilled.agreement,
        }
    if moe is not None:
        loss, more = add_router_losses(loss, moe, output.routings)
        parts |= {f"train/{name}": value for name, value in more.items()}
    return loss, parts, output.routings


def mean_over_ranks(value: Tensor) -> Tensor:
    """Average `value` over ranks, in place."""
    if distributed.is_initialized():
        distributed.all_reduce(value)
        value /= distributed.get_world_size()
    return value


class Window:
    """The micro-batches of this rank since the last optimizer step, and their losses and sizes over all ranks, on the device.

    Attributes:
        samples: sequences of all ranks; until `read`, those of this rank times the number of ranks.
        tokens: positions of all ranks, likewise.
        lengths: sum over those positions of the lengths of their sequences.
        taken: the optimizer's step has been, or is about to be, taken.
    """

    def __init__(self) -> None:
        self.losses: list[Tensor] = []  # of each micro-batch of this rank
        self.samples = self.tokens = self.lengths = 0
        self.names: list[str] = []  # that the losses are logged under
        self.taken = False
        self._ranks = 1
        # [names + 3] sums over micro-batches of means over ranks: of losses, sequences, positions and lengths
        self._sums = torch.zeros(0)

    def add(self, batch: Batch, losses: dict[str, Tensor]) -> None:
        """Count one micro-batch; a collective."""
        if self.losses and self.names != list(losses):
            raise RunError(f"a step's micro-batches have other losses: {self.names} and {list(losses)}")
        samples, length = batch["tokens"].shape
        sizes = (samples, samples * length, samples * length**2)
        means = local = torch.stack([value.detach().float() for value in losses.values()])  # [names]
        if distributed.is_initialized():  # ranks may have batches of other sizes; float64 holds their numbers
            self._ranks = distributed.get_world_size()
            means = torch.cat([means.double(), *(means.new_full((1,), size, dtype=torch.float64) for size in sizes)])
            mean_over_ranks(means)
        self._sums = self._sums + means if self.losses else means
        self.names = list(losses)
        self.losses.append(local)
        self.samples += sizes[0] * self._ranks
        self.tokens += sizes[1] * self._ranks
        self.lengths += sizes[2] * self._ranks

    def read(self, norm: Tensor) -> tuple[list[float], float]:
        """Read the mean losses over micro-batches and a norm from the device in one copy, and the sizes of all ranks."""
        *sums, norm_read = torch.cat([self._sums, norm.to(self._sums)[None]]).tolist()
        if self._ranks > 1:
            self.samples, self.tokens, self.lengths = (round(mean * self._ranks) for mean in sums[len(self.names) :])
        return [value / len(self.losses) for value in sums[: len(self.names)]], norm_read


class LearningRouters:
    """The routers of a model that learn from steps, and what the current step requested of them."""

    def __init__(self, gpt: GPT) -> None:
        layers = moe_layers(gpt)
        self._routers = {n: moe.router for n, moe in enumerate(layers) if moe.router.learns_from_steps}  # by MoE layer
        self.begin_step()

    def begin_step(self) -> None:
        """Forget the requests of the step before."""
        self._requests: list[Tensor] = []  # [E] of each router

    def count(self, routings: list[Routing]) -> None:
        """Count the requests of one micro-batch of this rank."""
        requests = [routings[layer].tokens_per_expert for layer in self._routers]
        earlier = self._requests or [torch.zeros_like(one) for one in requests]
        self._requests = [before + one for before, one in zip(earlier, requests, strict=True)]

    def after_step(self) -> None:
        """Update the routers with the requests of all ranks."""
        if not self._routers:
            return
        requests = torch.cat(self._requests)
        if distributed.is_initialized():
            distributed.all_reduce(requests)
        sizes = [router.num_experts for router in self._routers.values()]
        for router, own in zip(self._routers.values(), requests.split(sizes), strict=True):
            router.after_step(own)
