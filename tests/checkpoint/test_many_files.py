"""A checkpoint of many ranks is opened file by file by the rank that needs it, not by every rank."""

from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed
from torch.testing._internal.distributed.fake_pg import FakeStore

from nlgmoe.checkpoint import reading, writing
from nlgmoe.checkpoint.entries import entry_shapes, optimizer_shapes
from nlgmoe.checkpoint.portable import make_document, read_checkpoint
from nlgmoe.checkpoint.reading import Checkpoint
from nlgmoe.checkpoint.verify import find_problems
from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.model.gpt import GPT
from nlgmoe.parallel import sharded_checkpoint
from nlgmoe.parallel.expert_groups import make_groups
from nlgmoe.parallel.sharded_checkpoint import read_shared
from tests.checkpoint.runs import NEEDED
from tests.support.checkpoints import write

RANKS, DEGREE = 128, 16
CONFIG = GPTConfig(61, 16, 4, 8, 2, moe=MoEConfig(DEGREE))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that `RANKS` ranks could have saved: as many files of weights, and of moments."""
    path = tmp_path_factory.mktemp("many") / "many.ckpt"
    model = GPT(CONFIG)
    document, _ = make_document(NEEDED | {"model_config": CONFIG.to_dict(), "global_step": 1, "optimizer_groups": []})
    files: dict[str, Any] = {}
    with writing.new_folder(path) as temporary:
        for kind, shapes in {"model": entry_shapes(model), "optimizer": optimizer_shapes(model)}.items():
            entries = {name: torch.zeros(shape) for name, shape in shapes.items()}
            for rank in range(RANKS):
                own = dict(list(entries.items())[rank::RANKS])
                files |= writing.write_tensors(temporary, kind, own, rank, RANKS)
        writing.finish(temporary, path, document, files)
    return path


def wanted_by(names: Any, expert: int, group: Any, found: list[str]) -> dict[Any, Any]:
    """The entries that a rank with one expert of each layer needs, by group; it notes those that it gets."""
    receive = {name: lambda value, name=name: found.append(name) for name in names}
    dense = {name: to for name, to in receive.items() if ".experts." not in name}
    return {
        distributed.group.WORLD: dense,
        group: {name: to for name, to in receive.items() if f".experts.{expert}." in name},
    }


@pytest.mark.parametrize("rank", [0, 77])
def test_resume_opens_a_small_part_of_the_files_on_a_rank(
    checkpoint: Path, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    open_tensors, open_text = reading.safe_open, Path.open

    def count(path: Path) -> None:
        if checkpoint in path.parents:
            opened.append(path.name)

    monkeypatch.setattr(reading, "safe_open", lambda path, **options: count(path) or open_tensors(path, **options))
    monkeypatch.setattr(Path, "open", lambda path, *args, **options: count(path) or open_text(path, *args, **options))
    # The fake group's ranks are not there: none can say what it failed at.
    monkeypatch.setattr(sharded_checkpoint, "raise_on_all_ranks", nullcontext)
    distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=RANKS)
    try:
        group = make_groups(DEGREE, timedelta(seconds=1)).data_parallel
        folder = Checkpoint(checkpoint)
        assert list(find_problems(folder, rank, RANKS)) == []
        assert read_checkpoint(folder)["global_step"] == 1
        for kind in ("model", "optimizer"):
            files, found = folder.tensors(kind), list[str]()
            wanted = wanted_by(files.shapes, rank % DEGREE, group, found)
            read_shared(files, wanted, torch.device("cpu"))
            assert sorted(found) == sorted(name for names in wanted.values() for name in names)
            for names in wanted.values():
                shares = files.divide(names, RANKS)
                assert sorted(name for share in shares for name in share) == sorted(names)
                sizes = [[files.shapes[name].numel() for name in share] for share in shares]
                even = sum(map(sum, sizes)) / RANKS
                assert all(sum(of_rank[:-1]) < even for of_rank in sizes)  # by less than an entry above
    finally:
        distributed.destroy_process_group()
    tensors = [name for name in opened if name.endswith(".safetensors")]
    assert len(tensors) <= 10 and len(opened) <= 25, opened


def test_entries_without_values_are_divided_too(tmp_path: Path) -> None:
    files = Checkpoint(write(tmp_path / "a.ckpt", GPTConfig(61, 16, 2, 16, 2))).tensors("model")
    for shapes in ([[4], [4], [0]], [[0]], [[0], [4]]):
        files.shapes = {str(number): torch.Size(shape) for number, shape in enumerate(shapes)}
        shares = files.divide(files.shapes, 2)
        assert sorted(name for share in shares for name in share) == sorted(files.shapes)
