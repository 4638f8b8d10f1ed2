"""Commands of docs/fine_tune.md on the cut; tests/benchmarks/test_real_model.py takes the whole path."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from nlgmoe import load_model, load_pretrained
from nlgmoe.checkpoint.reading import Checkpoint
from nlgmoe.checkpoint.verify import find_problems
from nlgmoe.cli.train import main as train
from nlgmoe.commands.main import main
from nlgmoe.data import IndexedDataset
from nlgmoe.data.model_files import IDS
from nlgmoe.data.tokenizer import detokenize
from tests.real import CUT
from tests.support.commands import error_of, rows_of, train_py

QUESTIONS = ["What is 12?", "And\nthe <|im_end|> king?"]
CHAT = "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\nThe king's <br> house.<|im_end|>\n"
TEXT = "The king said that in 1984 it's 12 metres, and he went to the house.\n" * 80
FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`published` is the cut with a second stop token, which ends the answer to the first question; `cut.ckpt` is made of it."""
    path = tmp_path_factory.mktemp("cut")
    main(["import", str(CUT), str(path / "gguf.ckpt")])
    main(["export", str(path / "gguf.ckpt"), str(path / "published")])
    tokenizer, theirs = loaded(path / "published")
    answer = answer_of(tokenizer, theirs, QUESTIONS[0], eos_token_id=None)
    last = next(token for number, token in enumerate(answer) if number >= 3 and answer.index(token) == number)
    ends = json.loads((path / "published/generation_config.json").read_text()) | {"eos_token_id": [2, last]}
    (path / "published/generation_config.json").write_text(json.dumps(ends))
    main(["import", str(path / "published"), str(path / "cut.ckpt")])
    (path / "text.txt").write_text(TEXT)
    return path


def loaded(folder: Path) -> tuple[Any, Any]:
    return AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)


def answer_of(tokenizer: Any, model: Any, question: str, **options: Any) -> list[int]:
    messages = [{"role": "user", "content": question}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    assert tokenizer.decode(ids[0]).startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    answer: list[int] = model.generate(ids, max_new_tokens=20, do_sample=False, **options)[0, ids.shape[1] :].tolist()
    return answer


def test_chat_answers_are_those_of_transformers_and_end(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer, theirs = loaded(folder / "published")
    answers = [answer_of(tokenizer, theirs, question) for question in QUESTIONS]
    assert answers[0][-1] == theirs.generation_config.eos_token_id[1] and len(answers[0]) < 20
    prompts = [word for question in QUESTIONS for word in ("--prompt", question)]
    main(["generate", str(folder / "cut.ckpt"), *prompts, "--chat", "--temperature=0", "--max-new-tokens=20"])
    texts = [detokenize(load_pretrained(folder / "cut.ckpt").tokenizer, answer) for answer in answers]
    assert texts[0] == tokenizer.decode(answers[0][:-1])  # the token that ends an answer is not printed
    expected = "".join(f"--- {question!r}\n{text}\n\n" for question, text in zip(QUESTIONS, texts, strict=True))
    assert capsys.readouterr().out == expected
    assert load_pretrained(folder / "cut.ckpt").tokenizer.stop_ids == {0, 2, answers[0][-1]}
    assert type(theirs).__name__ == "LlamaForCausalLM" and theirs.config.max_position_embeddings == 8192
    assert [getattr(theirs.config, name) for name in IDS] == [1, 2, 2]


def test_chat_without_a_template_ends_with_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder / "published", tmp_path / "plain", ignore=shutil.ignore_patterns("*.jinja"))
    main(["import", str(tmp_path / "plain"), str(tmp_path / "plain.ckpt")])
    line = error_of(capsys, "generate", tmp_path / "plain.ckpt", "--chat", "--prompt=a")
    assert line.startswith("error: chat=true: ") and "has no chat template; leave out --chat" in line


def require_chat_files(checkpoint: Path, folder: Path) -> None:
    """Require that an export of a checkpoint has the files of the model that it was made of."""
    published = folder / "published"
    exported = checkpoint.with_name(f"{checkpoint.name} exported")
    main(["export", str(checkpoint), str(exported)])
    for name in FILES:
        assert (exported / name).read_bytes() == (published / name).read_bytes()
    theirs, ours = (json.loads((model / "config.json").read_text()) for model in (published, exported))
    assert {name: ours.get(name) for name in IDS} == {name: theirs[name] for name in IDS}
    assert list(find_problems(Checkpoint(load_pretrained(checkpoint).path))) == []
    assert load_pretrained(checkpoint).tokenizer.stop_ids == load_pretrained(folder / "cut.ckpt").tokenizer.stop_ids


def test_chat_files_are_passed_on_by_upcycling_and_pruning(folder: Path, tmp_path: Path) -> None:
    mixture, pruned = tmp_path / "moe.ckpt", tmp_path / "pruned.ckpt"
    main(["upcycle", str(folder / "cut.ckpt"), str(mixture), "--num-experts=4", "--expert-interval=1"])
    main(["prune", str(mixture), str(pruned), "--num-experts=2", f"--text={folder / 'text.txt'}", "--windows=1"])
    for checkpoint in (mixture, pruned):
        require_chat_files(checkpoint, folder)
    (mixture / "generation_config.json").write_text("{}")
    assert "generation_config.json is damaged" in "".join(find_problems(Checkpoint(mixture)))


@torch.no_grad()
def test_upcycled_smollm2_has_the_dense_loss(folder: Path) -> None:
    main(["upcycle", str(folder / "cut.ckpt"), str(folder / "moe.ckpt"), "--num-experts=4"])
    dense, moe = (load_model(folder / name) for name in ("cut.ckpt", "moe.ckpt"))
    ids = torch.tensor([load_pretrained(folder / "cut.ckpt").tokenizer.encode(TEXT)[:200]])
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        for model in (dense, moe):
            logits = model.to(dtype).logits(model(ids).hidden)[0, :-1].float()
            losses.append(float(F.cross_entropy(logits, ids[0, 1:])))
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)  # 20.45 nats: 1e-6 is less than a rounding step of fp32
    assert losses[3] == pytest.approx(losses[2], abs=1e-3 * losses[2])
    main(["export", str(folder / "moe.ckpt"), str(folder / "exported_moe")])
    assert json.loads((folder / "exported_moe/config.json").read_text())["model_type"] == "mixtral"


def write_corpus(checkpoint: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Prepare conversations whose special tokens are read, but one, which has a byte without a token; return a run's settings."""
    lines = [CHAT.replace("house", f"house, number {number}") for number in range(40)]
    (folder / "chats.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in [*lines, "\4"]))
    options = ["--input", folder / "chats.jsonl", "--tokenizer", checkpoint, "--output", folder / "chats"]
    words = ["prepare-data", *map(str, options), f"--data-dir={folder}", "--special-tokens=read"]
    with pytest.raises(SystemExit):
        main(words)
    assert "chats.jsonl, line 41: a byte without a token (0x04, at byte 0 of the text)" in capsys.readouterr().err
    main([*words, "--on-bad-data=skip"])
    tokens = IndexedDataset(folder / "chats").tokens
    assert [int((tokens == special).sum()) for special in range(3)] == [40, 80, 80]
    corpus = {"data_dir": folder, "corpus": "nlgmoe.data.MegatronIndexed", "corpus.init_args.prefix": folder / "chats"}
    corpus |= {"corpus.init_args.split": [30, 10, 0], "seq_len": 32, "micro_batch_size": 1}
    return [f"--data.{name}={value}" for name, value in corpus.items()]


def test_student_of_smollm2_keeps_the_blocks_that_matter_and_the_chat_files(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, student = folder / "cut.ckpt", tmp_path / "student.yaml"
    options = [f"--text={folder / 'text.txt'}", "--windows=1", f"--output={student}"]
    main(["student", str(checkpoint), "--num-layers=3", "--step=1", *options])
    assert "influence" in capsys.readouterr().out and "num_layers: 3" in student.read_text()
    run = ["--trainer.max_steps=1", "--model.optimizer.lr=1e-3", f"--trainer.default_root_dir={tmp_path / 'run'}"]
    configs = ["--config", str(checkpoint.with_suffix(".yaml")), "--config", str(student)]
    train(["fit", *configs, *write_corpus(checkpoint, tmp_path, capsys), *run])
    require_chat_files(tmp_path / "run", folder)


def test_mixture_of_smollm2_learns_by_muon_on_two_ranks(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Five steps of conversations that are nearly the same; each of the 4 experts of a layer on one rank."""
    mixture = folder / "muon.ckpt"
    main(["upcycle", str(folder / "cut.ckpt"), str(mixture), "--num-experts=4", "--top-k=2"])
    configs = ["--config", str(mixture.with_suffix(".yaml")), *write_corpus(folder / "cut.ckpt", tmp_path, capsys)]
    strategy = ["--trainer.strategy=nlgmoe.ExpertParallelStrategy", "--trainer.strategy.expert_parallel_size=2"]
    optimizer = ["--model.optimizer.muon={}", "--model.optimizer.lr=1e-3", "--model.schedule.warmup_tokens=0"]
    steps = [
        "--trainer.max_steps=5",
        "--trainer.log_every_n_steps=1",
        "--trainer.accelerator=cpu",
        "--trainer.devices=2",
    ]
    run = [*strategy, *optimizer, *steps, f"--trainer.default_root_dir={tmp_path / 'run'}"]
    done = train_py("fit", *configs, *run, "--data.global_batch_size=8", "--data.micro_batch_size=4")
    assert done.returncode == 0, done.stderr
    losses = [float(row["train/loss"]) for row in rows_of(tmp_path / "run/metrics.csv") if row.get("train/loss")]
    assert len(losses) == 5 and losses[4] < losses[0]
    groups = Checkpoint(tmp_path / "run/checkpoints/last.ckpt").document["optimizer_groups"]
    assert any(group.get("muon") for group in groups)
