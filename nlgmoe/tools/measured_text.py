"""The text on which a command measures a model: the validation text of its run, or a file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nlgmoe.validation import SettingError, require

if TYPE_CHECKING:
    from nlgmoe.batch import Batch
    from nlgmoe.eval.loaded_model import LoadedModel

BATCH, LENGTH = 8, 2048  # sequences of a file at a time, and tokens of a sequence, at most


@dataclass(frozen=True)
class MeasuredText:
    """Text in batches.

    Attributes:
        batches: a list, or a DataLoader, which can be iterated over again and does not hold them all.
        domains: names, indexed by a batch's domain ids.
    """

    batches: Any
    domains: list[str]


def measured_text(
    config: Path | None,
    loaded: LoadedModel,
    text: str | None = None,
    windows: int = 200,
    tokenizer: str | None = None,
) -> MeasuredText:
    """Return sequences: of a file at most `LENGTH` tokens long, of a run as long as its own.

    Args:
        config: YAML file of the run; None: there is none.
        loaded: the model.
        text: a file of plain text; None: the run's validation text.
        windows: sequences, of each domain of the run's validation text, or of `text`.
        tokenizer: as data.tokenizer; None: the run's.
    """
    require(windows >= 1, f"windows={windows} must be at least 1 sequence")
    if text is not None:
        return MeasuredText(list(_file_batches(text, loaded, windows)), [Path(text).name])
    if config is None:
        raise SettingError("text=null: there is no config.yaml that names its text; give --text FILE")
    from nlgmoe.experiment import ONE_PROCESS, load_config

    changes: dict[str, Any] = {} if tokenizer is None else {"data__tokenizer": tokenizer}
    changes["data__max_eval_windows"] = windows
    # Of the trainer nothing is used, but it must fit this machine.
    data = load_config(config, **ONE_PROCESS, trainer__accelerator="cpu", trainer__logger=False, **changes).data
    data.prepare_data()
    batches = data.val_dataloader()
    require(
        data.tokenizer is None or data.tokenizer.has_same_ids(loaded.tokenizer),
        f"the run's text of {config} is of another tokenizer than the checkpoint {loaded.path}; give --text FILE",
    )
    return MeasuredText(batches, data.domains)


def _file_batches(text: str, loaded: LoadedModel, windows: int) -> Iterator[Batch]:
    import numpy as np

    from nlgmoe.data.documents import UnusableError, decode_text
    from nlgmoe.data.samples import EvaluationSource
    from nlgmoe.data.sampling import collate

    try:
        ids = loaded.tokenizer.encode(decode_text(Path(text).read_bytes()))
    except (OSError, UnusableError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise SettingError(f"text={text} cannot be read ({reason}); give a file of text in UTF-8") from error
    require(len(ids) > 0, f"text={text} has no token; give text")
    length = min(loaded.model.config.seq_len, LENGTH)
    source = EvaluationSource([np.array(ids)], length, loaded.tokenizer.eod_id, windows)
    for first in range(0, len(source), BATCH):
        yield collate([source.sample(index) for index in range(first, min(first + BATCH, len(source)))])
