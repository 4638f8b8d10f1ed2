"""Makes the golden files: `python -m tests.golden.make` in the repository's root.

The files that are committed were made by the code of commit 338e1af, one thread, torch 2.13 on an x86-64 CPU with AVX512.
Make them again only when a change of the format or of the numbers is intended, and say so in CHANGELOG.md.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from nlgmoe.commands.main import main
from nlgmoe.data.indexed import IndexedWriter, token_dtype
from nlgmoe.data.tokenizer import Tokenizer
from nlgmoe.data.tokenizer_loading import train_byte_level_bpe
from tests.golden import recording as golden

WORDS = {
    "prose": "the cat sat on the mats and some students were reading 12 books in naïve 日本 quietly\n",
    "verse": "o rose thou art sick the invisible worm that flies in the night\n",
}
RANKS = [
    "--trainer.strategy=nlgmoe.ExpertParallelStrategy",
    "--trainer.strategy.init_args.expert_parallel_size=2",
    "--trainer.devices=2",
]


def write_corpus() -> None:
    """Two parts of made-up documents, and a tokenizer of 300 tokens."""
    rng = random.Random(1)
    texts = {
        name: [" ".join(rng.choices(words.split(" "), k=rng.randint(5, 60))) for _ in range(80)]
        for name, words in WORDS.items()
    }
    backend = train_byte_level_bpe(iter([text for part in texts.values() for text in part]), 300)
    (golden.CORPUS / "tokenizer").mkdir(parents=True)
    backend.save(str(golden.CORPUS / "tokenizer" / "tokenizer.json"))
    tokenizer = Tokenizer(backend, "golden")
    assert tokenizer.vocab_size == 300
    for name, documents in texts.items():
        with IndexedWriter(golden.CORPUS / name, token_dtype(300)) as writer:
            for text in documents:
                writer.add_document([*tokenizer.encode(text), tokenizer.eod_id])


def run(folder: Path, *extra: str) -> None:
    words = ["fit", f"--config={golden.GOLDEN / 'run.yaml'}", f"--trainer.default_root_dir={folder}", *extra]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    subprocess.run([sys.executable, "train.py", *words], check=True, env=environment)


def make(scratch: Path) -> None:
    for path in (golden.CORPUS, golden.TEACHER_LOGITS, *golden.CHECKPOINTS.values()):
        shutil.rmtree(path, ignore_errors=True)
    write_corpus()
    for (name, path), extra in zip(golden.CHECKPOINTS.items(), ([], RANKS), strict=True):
        run(scratch / name, *extra)
        shutil.copytree(scratch / name / "checkpoints" / "step-6.ckpt", path)
    config = (scratch / "1 process" / "config.yaml").read_text().replace(str(scratch / "1 process"), "runs/golden")
    golden.CONFIG.write_text(config)
    teacher = str(golden.TEACHER)
    recorded = ["--top-k=8", "--samples=64", "--temperature=2.0", f"--output={golden.TEACHER_LOGITS}"]
    main(["distill-logits", str(golden.CONFIG), f"--teacher={teacher}", *recorded])
    (golden.GOLDEN / "record.json").write_text(json.dumps(golden.record(scratch / "record"), indent=1) + "\n")
    (golden.CORPUS / ".lock").unlink(missing_ok=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(tempfile.gettempdir()) / "golden"  # its name is in the checkpoints
    folder.mkdir()
    make(folder)
    shutil.rmtree(folder)
