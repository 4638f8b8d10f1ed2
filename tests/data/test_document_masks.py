"""Where documents begin, as a batch says it."""

from collections.abc import Callable

import pytest
import torch

from nlgmoe import PileDataModule
from tests.support.corpora import batches

EOD = 0


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
