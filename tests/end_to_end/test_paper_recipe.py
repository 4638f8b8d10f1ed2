"""A file of the paper's, run as its user would: the same settings with a tiny model on a corpus in Megatron's format."""

import csv
import json
from pathlib import Path

import numpy as np

from nlgmoe import load_model
from nlgmoe.cli.train import main
from nlgmoe.data import IndexedDataset, IndexedWriter, load_tokenizer
from nlgmoe.data.pocket_pile import token_folder

ROOT = Path(__file__).parents[2]
CONFIGS = [str(ROOT / "configs" / name) for name in ("pr_moe/350m_pr_moe_32_64.yaml", "hardware/cpu.yaml")]
TINY = [
    "--model.config.vocab_size=4096",
    "--model.config.num_layers=4",
    "--model.config.moe.num_experts=[2,4]",
    "--model.config.hidden_size=16",
    "--model.config.seq_len=32",
    "--model.config.num_heads=2",
    "--model.schedule.warmup_tokens=1024",
    "--data.tokenizer=pocket-4k",
    "--data.global_batch_size=8",  # two micro-batches
    "--data.max_eval_windows=4",
    "--trainer.val_check_interval=2",
    "--trainer.log_every_n_steps=1",
]
STEP = 8 * 32  # tokens


def test_published_recipe_trains_and_resumes(pocket_pile: Path, tmp_path: Path) -> None:
    source = IndexedDataset(token_folder(pocket_pile, load_tokenizer("pocket-4k", pocket_pile)) / "code")
    with IndexedWriter(tmp_path / "pile_text_document", np.dtype(np.uint16)) as writer:
        for document in range(len(source) - 37, len(source)):  # those for validation
            writer.add_document(source[document])
    run, recipe = tmp_path / "run", tmp_path / "recipe.yaml"
    recipe.write_text(Path(CONFIGS[0]).read_text().replace("every_n_train_steps: 10_000", "every_n_train_steps: 2"))
    settings = [f"--config={recipe}", f"--config={CONFIGS[1]}", *TINY, f"--data.data_dir={pocket_pile}"]
    settings += [
        f"--data.corpus.init_args.prefix={tmp_path / 'pile_text_document'}",
        f"--trainer.default_root_dir={run}",
    ]
    main(["fit", *settings, f"--model.train_tokens={3 * STEP}"])
    checkpoints = run / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["best.ckpt", "last.ckpt", "step-3.ckpt"]
    assert (checkpoints / "last.ckpt").resolve().name == "step-3.ckpt"

    main(["fit", *settings, f"--model.train_tokens={6 * STEP}", "--data.micro_batch_size=2", "--ckpt_path=last"])
    assert sorted(path.name for path in checkpoints.iterdir()) == ["best.ckpt", "last.ckpt", "step-6.ckpt"]
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["steps"], summary["tokens"]) == (6, 6 * STEP)
    assert set(summary["bits_per_byte"]) == {"all", "pile_text_document"}
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["train/tokens"]) for row in rows if row["train/loss"]] == [step * STEP for step in range(6)]
    validated = [row for row in rows if row["val/loss"]]
    assert len(validated) == 3  # after steps 2, 4 and 6: the end of the shorter run is no step of this one
    assert load_model(checkpoints / "last.ckpt").config.moe.num_experts == [2, 4]  # type: ignore[union-attr]
    main(["test", *settings, f"--ckpt_path={checkpoints / 'last.ckpt'}"])
