"""A rank that a callback has stopped alone says so, in place of leaving the others in a collective."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning import Trainer
from lightning.pytorch.callbacks import Callback
from torch import distributed

from nlgmoe.parallel import same_end
from tests.checkpoint.runs import ACCUMULATE, fit


class Stop(Callback):
    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        trainer.should_stop = trainer.should_stop or batch_idx == 2 * ACCUMULATE - 2  # within the second step


@pytest.mark.parametrize("others_end", [True, False])
def test_a_rank_ends_only_where_the_others_do(
    others_end: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    store = distributed.HashStore()
    ranks = {"is_initialized": lambda: True, "get_rank": lambda: 1, "get_world_size": lambda: 3}
    monkeypatch.setattr(same_end, "distributed", SimpleNamespace(**ranks, DistStoreError=distributed.DistStoreError))
    monkeypatch.setattr(same_end, "_get_default_store", lambda: store)
    monkeypatch.setattr(same_end, "WAIT_SECONDS", 0.1)
    store.set("nlgmoe/ends after 2/0", "")
    if others_end:
        store.set("nlgmoe/ends after 2/2", "")
        assert fit(tmp_path, Stop()).global_step == 2
    else:
        with pytest.raises(ValueError, match=r"rank 1 ends training after step 2, but not rank 2: .*reduce_boolean"):
            fit(tmp_path, Stop())
