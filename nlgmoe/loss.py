"""The training loss of one micro-batch.

    loss = CE + beta * T^2 * KL(teacher || student) + loss_coeff * balance + z_loss_coeff * z + the routers' own

Cross-entropy and KL divide by the mean number of counted tokens of a rank, so that the mean over ranks is the loss of the whole
batch.
"""

import torch
from torch import Tensor

from nlgmoe.batch import Batch, loss_mask, token_mask_or_none
from nlgmoe.device import fork_rng
from nlgmoe.distill.distiller import Distiller
from nlgmoe.layers.balance import add_router_losses
from nlgmoe.layers.losses import cross_entropy, distilled_cross_entropy
from nlgmoe.layers.routing import Routing
from nlgmoe.model.gpt import GPT, NoiseKey
from nlgmoe.ranks import mean_over_ranks
from nlgmoe.seeding import derive_seed


def training_loss(
    gpt: GPT, batch: Batch, noise_key: NoiseKey, chunk_size: int, distiller: Distiller | None = None
) -> tuple[Tensor, dict[str, Tensor], list[Routing]]:
    """Compute the loss of one micro-batch; a second call with the same arguments computes the same.

    Args:
        noise_key: (seed, step, micro-batch index over all ranks) of every random draw.
        distiller: reads the teacher; None, or after its end: no distillation.

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
        if distiller is not None:  # Lightning would keep logging the last values
            parts |= dict.fromkeys(("train/distillation_loss", "train/teacher_agreement"), loss.new_zeros(()))
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
