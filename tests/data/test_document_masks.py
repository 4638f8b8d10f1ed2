"""Where documents begin, as a batch says it."""

from collections.abc import Callable

import pytest
import torch

from nlgmoe import PileDataModule
from nlgmoe.data.sampling import mark_documents
from tests.support.corpora import batches

EOD = 0


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("mask_loss", [False, True])
def test_document_mask_opens_a_document_at_an_end_of_document(attention: bool, mask_loss: bool) -> None:
    sample = {
        "tokens": torch.tensor([5, EOD, 6, 7, EOD, 8, EOD, 9]),
        "targets": torch.tensor([EOD, 6, 7, EOD, 8, EOD, EOD, EOD]),
        "token_mask": torch.tensor([1, 1, 1, 1, 1, 1, 0, 0]).bool(),  # the last two are padding
        "domain": torch.tensor(1),
    }
    marked = mark_documents(sample, EOD, attention, mask_loss)  # type: ignore[arg-type]
    added = {name: value.int().tolist() for name, value in marked.items() if name not in sample}
    expected = {"document": [0, 1, 1, 1, 2, 2, 3, 3]} if attention else {}
    expected |= {"loss_mask": [1, 0, 1, 1, 0, 1, 0, 0]} if mask_loss else {}
    assert added == expected
    assert all(marked[name] is value for name, value in sample.items())  # type: ignore[literal-required]


@pytest.mark.parametrize("option", ["document_attention", "mask_eod_loss"])
def test_document_masks_are_in_batches_of_training_and_evaluation_on_request(
    option: str, make_data: Callable[..., PileDataModule]
) -> None:
    data = make_data(**{option: True})
    for batch in (*batches(data, 3), *data.val_dataloader()):
        opens = batch["tokens"] == data.tokenizer.eod_id
        if option == "document_attention":
            assert torch.equal(batch["document"], opens.cumsum(1)) and "loss_mask" not in batch
        else:
            assert torch.equal(batch["loss_mask"], batch["token_mask"] & ~opens) and "document" not in batch
