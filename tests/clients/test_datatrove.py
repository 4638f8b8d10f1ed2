"""What datatrove writes, by the script in docs/data.md, is a corpus with the tokens of `prepare-data`."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np

from nlgmoe.data import MegatronIndexed, load_tokenizer
from nlgmoe.data.tokenizer_loading import train_tokenizer

ROOT = Path(__file__).parents[2]
TEXTS = [f"document {number}: naïve 日本\n" + "reading books " * (number % 9) for number in range(90)]


def test_datatrove_files_are_read_as_they_are(tmp_path: Path) -> None:
    """With its local executor in place of Slurm's; one of the tasks has no file, and writes no document."""
    (tmp_path / "texts").mkdir()
    for number in range(3):
        content = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS[30 * number : 30 * number + 30])
        (tmp_path / "texts" / f"{number}.jsonl").write_text(content)
    train_tokenizer(iter(TEXTS), 400, tmp_path / "data" / "first.tokenizer")
    (script,) = re.findall(r"```python\n(from datatrove.*?)```", (ROOT / "docs/data.md").read_text(), re.DOTALL)
    for old, new in (("SlurmPipelineExecutor", "LocalPipelineExecutor"), ("tasks=30", "tasks=4")):
        script = script.replace(old, new)
    (tmp_path / "script.py").write_text(re.sub(r" +(time|partition)=.*\n", "", script))
    subprocess.run([sys.executable, "script.py"], cwd=tmp_path, check=True, timeout=120)
    assert len([*(tmp_path / "data" / "trove").glob("*.idx")]) == 4
    tokenizer = load_tokenizer(str(tmp_path / "data" / "first.tokenizer"), tmp_path)
    corpus = MegatronIndexed(str(tmp_path / "data" / "trove" / "*"), [90, 10, 0]).open(tmp_path, tokenizer.name)
    (training,), held_out = corpus.tokens["train"], corpus.tokens["validation"]
    assert corpus.domains == ["trove"]
    wanted = [[*tokenizer.encode(text), tokenizer.eod_id] for text in TEXTS]
    split = [[ids for i, ids in enumerate(wanted) if (i % 30 >= 27) == last] for last in (False, True)]
    for found, texts in ((training, split[0]), (held_out[0], split[1])):
        assert np.array_equal(found[:], np.concatenate(texts))
