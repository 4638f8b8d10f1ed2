"""MIXTURE-OF-STUDENTS: distil a trained PR-MoE into one with fewer blocks (paper, section 4.2).

    loss = cross-entropy + beta * T^2 * KL(teacher || student at temperature T) + the balance losses

The teacher is outside the student's module tree: checkpoints, optimizer and engine do not include it. `StagedDistillation`
ends distillation.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Literal

import torch
from lightning import Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from typing_extensions import override

from nlgmoe.batch import Batch
from nlgmoe.checkpoint.entries import dtype_of, local_entries
from nlgmoe.checkpoint.reading import Checkpoint, tokenizer_matches
from nlgmoe.config import GPTConfig
from nlgmoe.data.training_data import TrainingData, length_of, training_data
from nlgmoe.distill.distiller import Distiller, find_teacher
from nlgmoe.layers.experts import Experts
from nlgmoe.layers.losses import SoftTargets, TeacherTargets
from nlgmoe.layers.precision import cast_by_autocast
from nlgmoe.model.gpt import GPT
from nlgmoe.parallel.triton_grouped_gemm import set_triton_grouped_gemm
from nlgmoe.pyramid import PlacesExperts, experts_per_layer
from nlgmoe.ranks import raise_on_all_ranks
from nlgmoe.validation import require


class MixtureOfStudents(Distiller):
    """A frozen teacher and its distillation loss.

    The teacher's architecture is read from its checkpoint: dense or MoE, of any size, with the student's vocabulary. Its
    input is the student's; it has no dropout, token dropping or noise.

    Args:
        teacher: folder of a checkpoint, such as runs/laptop_pr_moe/checkpoints/last.ckpt, or a run folder: its newest valid
            checkpoint. Loaded when training begins, unless distillation has ended. A resumed run uses the same weights, or
            ends if they no longer exist.
        beta: weight of the distillation loss.
        temperature: divides the logits of both models before the KL divergence.
        precision: precision of the teacher's weights and matrix products, `fp32` or `bf16`; null: the student's.
    """

    def __init__(
        self,
        teacher: str,
        beta: float = 1.0,
        temperature: float = 1.0,
        precision: Literal["fp32", "bf16"] | None = None,
    ) -> None:
        super().__init__(beta, temperature)
        dtype_of(precision)  # refuses an unknown one
        self.teacher, self.precision = teacher, precision
        self.model: GPT | None = None  # this rank's shard of the teacher, until `release`

    @override
    def start(self, student: GPT, trainer: Trainer) -> None:
        self.release()
        if self.loss_weight == 0:
            return
        self.load(student.config, student.token_embedding.weight, training_data(trainer), trainer.strategy)

    def load(self, student: GPTConfig, like: Tensor, data: Any, strategy: Any = None) -> Checkpoint:
        """Load the teacher, with the device and dtype of `like`, and return its checkpoint."""
        with raise_on_all_ranks():
            checkpoint = self._find()
            config = checkpoint.config
            _check_fit(checkpoint, student, data)
        divides = isinstance(strategy, PlacesExperts)
        placements = strategy.expert_placements(config, model_name="teacher") if divides else {}
        with raise_on_all_ranks():
            self.model = _load(checkpoint, config, placements, like.device, dtype_of(self.precision) or like.dtype)
            set_triton_grouped_gemm(self.model, like.device)
        rank_zero_info(f"the teacher is {checkpoint.path}: {_describe(self.model)}")
        return checkpoint

    def _find(self) -> Checkpoint:
        """Return the checkpoint: the one already used, else that of `teacher`, of a run the newest valid one."""
        path, remedy = self.teacher, "set it to a trained checkpoint, or model.distiller=null to train on text alone"
        if self._used.get("setting") == self.teacher:
            path, remedy = self._used["checkpoint"], "this run has learned from it: restore it, or set another path"
        checkpoint, weights = find_teacher(path, remedy)
        self.pin_teacher("teacher", self.teacher, str(checkpoint.path), weights)
        return checkpoint

    @override
    def release(self) -> bool:
        if self.model is None:
            return False
        self.model = None
        return True

    @override
    @torch.no_grad()
    def read(self, batch: Batch, mask: Tensor | None) -> TeacherTargets | None:
        model = self.model
        if model is None:
            return None
        with self._own_precision():
            hidden = model(batch["tokens"], mask, documents=batch.get("document")).hidden.flatten(0, 1)
            unembedding = model.unembedding
        if self.precision is None:  # once, not for every chunk
            hidden, unembedding = cast_by_autocast(hidden), cast_by_autocast(unembedding)

        def logits(positions: slice) -> Tensor:
            with torch.no_grad(), self._own_precision():
                return (hidden[positions] @ unembedding.to(hidden.dtype).t())[:, : model.config.vocab_size]

        return SoftTargets(logits, self.beta * self.loss_weight, self.temperature)

    def _own_precision(self) -> AbstractContextManager[Any]:
        assert self.model is not None
        device = self.model.token_embedding.weight.device.type
        return nullcontext() if self.precision is None else torch.autocast(device, enabled=False)


def _describe(teacher: GPT) -> str:
    config, parameters = teacher.config, list(teacher.parameters())
    experts = sum(module.count for module in teacher.modules() if isinstance(module, Experts))
    size = sum(parameter.numel() for parameter in parameters)
    return (
        f"{config.num_layers} blocks, {config.hidden_size} wide; a rank holds {experts} of its {sum(experts_per_layer(config))} "
        f"experts, in all {size / 1e6:,.1f}M parameters of {parameters[0].dtype} on {parameters[0].device}"
    )


def _check_fit(checkpoint: Checkpoint, student: GPTConfig, data: TrainingData | None) -> None:
    teacher, setting, seq_len = (
        checkpoint.config,
        f"model.distiller.teacher={checkpoint.path}",
        length_of(data, student.seq_len),
    )
    require(
        teacher.vocab_size == student.vocab_size,
        f"{setting} has vocab_size={teacher.vocab_size}, the student {student.vocab_size}; use a teacher with the student's "
        "tokenizer",
    )
    require(
        teacher.seq_len >= seq_len,
        f"{setting} reads seq_len={teacher.seq_len} tokens, and a sequence has {seq_len}; use another, or lower data.seq_len",
    )
    tokenizer = None if data is None else data.tokenizer
    require(
        tokenizer is None or tokenizer_matches(tokenizer.files, checkpoint.tokenizer()),
        f"{setting} has another tokenizer than data.tokenizer; use a teacher with the student's",
    )


@torch.no_grad()
def _load(checkpoint: Checkpoint, config: GPTConfig, placements: Any, device: torch.device, dtype: torch.dtype) -> GPT:
    """Load this rank's shard of the teacher, frozen and without token dropping, entry by entry."""
    if config.moe is not None:
        config = replace(config, moe=replace(config.moe, eval_token_dropping=False))
    with torch.device("meta"):
        model = GPT(config, placements=placements)
    files = checkpoint.tensors("model")
    model = model.to(dtype).to_empty(device=device).requires_grad_(False).eval()
    for entry in local_entries(model):
        entry.copy_(files.read(entry.name))
    return model
