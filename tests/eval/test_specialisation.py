"""Expert specialisation, compared with counts by hand and with a second evaluation."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from nlgmoe import GPTConfig, MoEConfig, MoEGPTModule
from nlgmoe.callbacks import ExpertSpecialisation
from nlgmoe.eval.specialisation import (
    CLASSES,
    FILE,
    ExpertCounts,
    Specialisation,
    count_experts,
    entropy,
    mutual_information,
    preference,
    token_class,
)
from nlgmoe.layers.routing import Routing
from tests.support.synthetic import Spelt, SyntheticData
from tests.support.trainers import trainer


def test_token_classes() -> None:
    kinds = {
        "word start": [" the", " Ünder"],
        "word part": ["ing", "é"],
        "number": [" 1984", "7"],
        "punctuation": [".", "),", "—"],
        "code symbol": [" {", "==", "_name"],
        "whitespace": ["\n\n   "],
        "other": ["🙂", "\x00"],
        "end of document": [""],
    }
    assert {kind: {token_class(text.encode()) for text in texts} for kind, texts in kinds.items()} == {
        kind: {kind} for kind in kinds
    }
    assert token_class("é".encode()[:1]) == "other"  # part of a character


def routing(expert: list[list[int]], mask: list[bool] | None) -> Routing:
    chosen = torch.tensor(expert)
    kept = torch.ones_like(chosen, dtype=torch.bool)
    return Routing(chosen, kept.float(), kept, 0, None if mask is None else torch.tensor(mask))


def test_specialisation_counts_by_hand() -> None:
    counts = ExpertCounts([2, 3], ["a", "b"], [b"", b" the", b"7"])
    tokens, domain = torch.tensor([[1, 2], [1, 0]]), torch.tensor([0, 1])
    first = routing([[0, 1], [0, 1], [1, 0], [0, 1]], [True, True, True, False])
    second = routing([[2, 0], [2, 1], [2, 0], [0, 1]], [True, True, True, False])
    counts.update(tokens, domain, [first, second])
    counts.update(tokens[:1], domain[:1], [routing([[0, 0], [0, 0]], None)] * 2)
    found = counts.specialisation()
    start, number = CLASSES.index("word start"), CLASSES.index("number")
    expected = np.zeros((2, len(CLASSES), 2, 3), dtype=int)
    expected[0, start, 0] = [1 + 2, 1, 0]
    expected[0, number, 0] = [1 + 2, 1, 0]
    expected[1, start, 0] = [1, 1, 0]
    expected[0, start, 1] = [1 + 2, 0, 1]
    expected[0, number, 1] = [2, 1, 1]
    expected[1, start, 1] = [1, 0, 1]
    assert found.counts.tolist() == expected.tolist()
    assert found.by_domain(0).tolist() == [[6, 2], [1, 1]]
    assert found.by_class(1)[start].tolist() == [4, 0, 2]


def test_specialisation_preference_and_information_by_hand() -> None:
    assert preference(np.array([[3, 1], [1, 3]])).tolist() == [[1.5, 0.5], [0.5, 1.5]]
    assert mutual_information(np.array([[2, 0], [0, 2]])) == entropy(np.array([[2, 0], [0, 2]])) == 1.0
    assert mutual_information(np.array([[2, 4], [1, 2], [0, 0]])) == pytest.approx(0)
    counts = np.array([[3, 1], [0, 4]])
    by_hand = 3 / 8 * math.log2(3 / 8 / (1 / 2 * 3 / 8)) + 1 / 8 * math.log2(1 / 8 / (1 / 2 * 5 / 8))
    by_hand += 4 / 8 * math.log2(4 / 8 / (1 / 2 * 5 / 8))
    assert mutual_information(counts) == pytest.approx(by_hand)
    assert np.isnan(preference(np.array([[3, 0], [1, 0]]))[:, 1]).all()
    assert mutual_information(np.zeros((2, 2))) == 0


@pytest.mark.parametrize("data", [SyntheticData, Spelt])
def test_specialisation_of_validation_data_is_written_by_a_run(data: type[SyntheticData], tmp_path: Path) -> None:
    module, text = MoEGPTModule(GPTConfig(61, 16, 4, 16, 2, moe=MoEConfig([2, 4], top_k=2))), data(padded=True)
    validation = {"val_check_interval": 3, "check_val_every_n_epoch": None, "limit_val_batches": 1.0}
    run = trainer(tmp_path, ExpertSpecialisation(), max_steps=3, **validation)
    run.fit(module, text)
    written = Specialisation.load(tmp_path)
    spellings = Spelt.tokenizer.spellings if data is Spelt else None
    again = count_experts(module.gpt.eval(), text.val_dataloader(), text.domains, spellings)
    assert (written.counts == again.counts).all()
    assert written.counts.sum() == 2 * 2 * sum(int(batch["token_mask"].sum()) for batch in text.val_dataloader())
    assert (written.domains, written.experts, written.step) == (["even", "odd"], [2, 4], 3)
    assert written.classes == (["all"] if spellings is None else list(CLASSES))
    (tmp_path / FILE).unlink()
    (tmp_path / "config.yaml").touch()
    run.validate(module, text, verbose=False)  # of whatever model: not the run's
    assert not (tmp_path / FILE).exists()
    (tmp_path / "config.yaml").unlink()
    run.validate(module, text, verbose=False)  # there is no run
    validated = Specialisation.load(tmp_path)
    assert (validated.counts == written.counts).all() and validated.step is None
