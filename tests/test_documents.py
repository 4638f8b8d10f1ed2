"""Document borders under MoEGPTModule: which positions count in a loss, and which only in routing."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from nlgmoe.batch import Batch
from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.module import MoEGPTModule
from tests.support.synthetic import SyntheticData
from tests.support.trainers import Recorder, trainer

CONFIG = GPTConfig(61, 16, 2, 32, 2, init_std=0.2, moe=MoEConfig(4, token_dropping=False, loss_coeff=0.0))


def losses_of(module: MoEGPTModule, batch: Batch) -> torch.Tensor:
    """Of every token, counted or not, by PyTorch's own function."""
    hidden = module.gpt(batch["tokens"], batch["token_mask"], documents=batch["document"]).hidden
    return F.cross_entropy(module.gpt.logits(hidden).flatten(0, 1), batch["targets"].flatten(), reduction="none").view(
        batch["targets"].shape
    )


def test_tokens_masked_for_the_loss_are_routed_all_the_same(tmp_path: Path) -> None:
    module, data, recorder = MoEGPTModule(CONFIG), SyntheticData(padded=True, documents=True), Recorder()
    batch: Batch = next(iter(data.train_dataloader()))
    assert 0 < batch["loss_mask"].sum() < batch["token_mask"].sum() < batch["tokens"].numel()
    expected = losses_of(module, batch)[batch["loss_mask"]].mean()
    trainer(tmp_path, recorder, max_steps=1).fit(module, data)
    assert recorder.losses[0] == pytest.approx(expected.item(), rel=1e-6)
    (routed,) = module.routings
    assert routed.num_tokens == batch["token_mask"].sum() == routed.kept.sum()


@pytest.mark.parametrize("option", ["document", "loss_mask"])
def test_document_and_padding_marks_each_change_the_loss(option: str, tmp_path: Path) -> None:
    class Without(SyntheticData):
        def train_dataloader(self):  # type: ignore[no-untyped-def]
            for batch in super().train_dataloader():
                batch.pop(option)
                yield batch

    found = []
    for kind in (SyntheticData, Without):
        recorder = Recorder()
        trainer(tmp_path, recorder, max_steps=1).fit(MoEGPTModule(CONFIG), kind(documents=True))
        found.append(recorder.losses)
    assert found[0] != pytest.approx(found[1], rel=1e-4)


def test_evaluation_counts_what_training_counts(tmp_path: Path) -> None:
    module, data = MoEGPTModule(CONFIG), SyntheticData(padded=True, documents=True)
    run = trainer(tmp_path, limit_val_batches=1.0)
    (validated,) = run.validate(module, data, verbose=False)
    module.eval()
    with torch.no_grad():
        pairs = [(losses_of(module, batch), batch["loss_mask"]) for batch in data.val_dataloader()]
    losses, counted = (torch.cat(column) for column in zip(*pairs, strict=True))
    assert validated["val/loss"] == pytest.approx(losses[counted].mean().item(), rel=1e-5)
    predicted = torch.cat(run.predict(module, data))  # type: ignore[arg-type]
    torch.testing.assert_close(predicted, losses * counted, rtol=1e-5, atol=1e-6)
