"""A chat model stays one: a small Llama with a template and two stop tokens, from its folder to checkpoints and back."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from nlgmoe import load_pretrained
from nlgmoe.checkpoint.verify import find_problems
from nlgmoe.cli.train import main as train
from nlgmoe.commands.main import main
from nlgmoe.data import IndexedDataset
from nlgmoe.data.model_files import IDS
from nlgmoe.data.tokenizer import detokenize
from tests.support.commands import error_of

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}{{ bos_token + message['role'] + '\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ bos_token + 'assistant\n' }}{% endif %}"
)
CHAT = "<|im_start|>user\nWho is the king?<|im_end|>\n<|im_start|>assistant\nThe queen's <br> husband.<|im_end|>\n"
MESSAGES = ["Who is the king?", "And\nthe <|im_end|> queen?"]
FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "chat_template.jinja"
)  # fmt: skip


def write_tokenizer(folder: Path) -> None:
    """As published: composed characters, a token that begins each text, a byte ("Q") without a token."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted({*pre_tokenizers.ByteLevel.alphabet()} - {"Q"})
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([CHAT] * 9, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<|im_start|> $A", special_tokens=[(SPECIAL[1], 1)])
    (folder / "tokenizer.json").write_text(backend.to_str(pretty=True), encoding="utf-8")
    named = {"bos_token": SPECIAL[1], "eos_token": SPECIAL[2], "pad_token": SPECIAL[2]}
    settings = named | {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "right", "model_max_length": 96}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "special_tokens_map.json").write_text(json.dumps(named))
    (folder / "chat_template.jinja").write_text(TEMPLATE)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder; the model's answer to the first message is ended by the second of its stop tokens."""
    folder = tmp_path_factory.mktemp("source")
    write_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=96, initializer_range=0.3, bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    prompt = ask(tokenizer, MESSAGES[0])
    answer = model.generate(**prompt, max_new_tokens=9, do_sample=False, eos_token_id=None)[0].tolist()[-9:]
    last = next(token for number, token in enumerate(answer) if number >= 3 and answer.index(token) == number)
    ends = {"bos_token_id": 1, "eos_token_id": [2, last], "pad_token_id": 2, "temperature": 0.6, "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps(ends))
    return folder


def ask(tokenizer: Any, message: str) -> Any:
    conversation = [{"role": "user", "content": message}]
    return tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_tensors="pt")


@pytest.fixture(scope="module")
def checkpoint(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("imported") / "chat.ckpt"
    main(["import", str(source), str(path)])
    return path


def run(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    capsys.readouterr()
    main([str(word) for word in words])
    return capsys.readouterr().out


def test_chat_answers_are_those_of_transformers_and_end(
    source: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    options = ["generate", checkpoint, "--chat", "--temperature=0", "--max-new-tokens=20"]
    answers = []
    for message in MESSAGES:
        prompt = ask(tokenizer, message)
        theirs = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0, prompt.input_ids.shape[1] :].tolist()
        answers.append(detokenize(load_pretrained(checkpoint).tokenizer, theirs) + "\n")
        assert run(capsys, *options, "--prompt", message) == answers[-1]
        if message == MESSAGES[0]:
            assert len(theirs) < 20 and theirs[-1] == model.generation_config.eos_token_id[1]
    both = run(capsys, *options, *(word for message in MESSAGES for word in ("--prompt", message)))
    assert both == "".join(f"--- {message!r}\n{text}\n" for message, text in zip(MESSAGES, answers, strict=True))


def test_chat_without_a_template_or_a_token_ends_with_one_line(
    source: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["generate", checkpoint, "--prompt=Queen"]
    for line in (error_of(capsys, *words), error_of(capsys, *words, "--chat")):
        assert "the text 'Queen' has a byte without a token (0x51, at byte 0 of the text)" in line
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).symlink_to(source / name)
    main(["import", str(tmp_path), str(tmp_path / "plain.ckpt")])
    line = error_of(capsys, "generate", tmp_path / "plain.ckpt", "--chat", "--prompt=a")
    assert line.startswith("error: chat=true: ") and "has no chat template; leave out --chat" in line


def write_corpus(folder: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Conversations whose special tokens are read, but one, which has a byte without a token; return the settings of a run."""
    lines = [CHAT.replace("husband", f"husband, number {number}") for number in range(40)]
    (folder / "chats.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in [*lines, "Queen"]))
    words = ["prepare-data", "--input", folder / "chats.jsonl", "--tokenizer", tokenizer, "--special-tokens=read"]
    words += ["--data-dir", folder, "--output", folder / "chats"]
    with pytest.raises(SystemExit):
        run(capsys, *words)
    line = "chats.jsonl, line 41: a byte without a token (0x51, at byte 0 of the text)"
    assert line in capsys.readouterr().err  # behind the progress
    out = run(capsys, *words, "--on-bad-data=skip")
    assert "left out   1 that cannot be used" in out
    tokens = IndexedDataset(folder / "chats").tokens
    assert [int((tokens == special).sum()) for special in range(3)] == [40, 80, 80]
    corpus = {"data_dir": folder, "corpus": "nlgmoe.data.MegatronIndexed", "corpus.init_args.prefix": folder / "chats"}
    return [f"--data.{name}={value}" for name, value in (corpus | {"corpus.init_args.split": [30, 10, 0]}).items()]


def test_chat_files_are_passed_on_by_student_upcycling_and_pruning(
    source: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    data = write_corpus(tmp_path, checkpoint, capsys)
    settings, student = checkpoint.with_suffix(".yaml"), tmp_path / "student.yaml"
    (tmp_path / "text.txt").write_text(CHAT * 9)
    text = [f"--text={tmp_path / 'text.txt'}", "--windows=2"]
    main(["student", str(checkpoint), "--num-layers=1", "--step=1", f"--output={student}", *text])
    short = ["--trainer.max_steps=2", "--model.optimizer.lr=1e-3", f"--trainer.default_root_dir={tmp_path / 'run'}"]
    train(["fit", "--config", str(settings), "--config", str(student), *data, *short, "--data.micro_batch_size=2"])
    mixture, pruned = tmp_path / "moe.ckpt", tmp_path / "pruned.ckpt"
    run(capsys, "upcycle", checkpoint, mixture, "--num-experts=4", "--top-k=2", "--expert-interval=1")
    run(capsys, "prune", mixture, pruned, "--num-experts=2", *text)
    for name in ("run", "moe.ckpt", "pruned.ckpt"):
        exported = tmp_path / f"{name} exported"
        main(["export", str(tmp_path / name), str(exported)])
        for file in FILES:
            assert (exported / file).read_bytes() == (source / file).read_bytes()
        theirs, ours = (json.loads((folder / "config.json").read_text()) for folder in (source, exported))
        assert {name: ours.get(name) for name in IDS} == {name: theirs.get(name) for name in IDS}
        assert AutoTokenizer.from_pretrained(exported).padding_side == "right"
        assert list(find_problems(load_pretrained(tmp_path / name).path)) == []
        assert load_pretrained(tmp_path / name).tokenizer.stop_ids == load_pretrained(checkpoint).tokenizer.stop_ids
    (mixture / "generation_config.json").write_text("{}")
    assert "generation_config.json is damaged" in "".join(find_problems(mixture))
