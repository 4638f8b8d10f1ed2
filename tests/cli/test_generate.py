"""`nlgmoe generate`, from a checkpoint to what is printed; in this process, since imports cost seconds."""

import io
import sys
from pathlib import Path

import pytest

from nlgmoe.commands.main import main
from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.data.tokenizer import detokenize
from nlgmoe.eval.generation import complete, generate
from nlgmoe.eval.loaded_model import load_pretrained
from tests.support.checkpoints import TOKENIZER, write

TEXTS = ["the king", "", "null", "日本 and the king", 'the "queen"\n', "1 + 1 =", "!and the king"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = GPTConfig(TOKENIZER.vocab_size, 32, 2, 16, 2, init_std=0.3, moe=MoEConfig(4))
    return write(tmp_path_factory.mktemp("run") / "checkpoints/step-0.ckpt", config, tokenizer=TOKENIZER.files)


def run(capsys: pytest.CaptureFixture, *args: object) -> tuple[str, str]:
    main(["generate", *map(str, args)])
    found = capsys.readouterr()
    return found.out, found.err


def test_generate_prints_one_prompt_as_it_goes_on(checkpoint: Path, capsys: pytest.CaptureFixture) -> None:
    trained = load_pretrained(checkpoint)
    tokens = TOKENIZER.encode("the king")
    for options, settings in (
        (("--temperature=0",), {"temperature": 0}),
        (("--top-k", 3, "--seed", 5), {"top_k": 3, "seed": 5}),
        (("--top-p=0.5", "--temperature", 2), {"top_p": 0.5, "temperature": 2.0}),
    ):
        ids = generate(trained.model, [tokens], 12, stop_ids=[TOKENIZER.eod_id], **settings)[0]
        for where in (checkpoint, checkpoint.parents[1]):  # or the run's folder
            out, err = run(capsys, where, "--prompt", "the king", "--max-new-tokens", 12, *options)
            assert (out, err) == (detokenize(TOKENIZER, ids) + "\n", "")


def test_generate_says_where_the_model_can_read_no_further(checkpoint: Path, capsys: pytest.CaptureFixture) -> None:
    note = " ended before max_new_tokens, at the model's seq_len=32\n"
    for count, subject in ((1, "the text"), (2, "2 of 2 texts")):
        _, err = run(capsys, checkpoint, *["--prompt", "the king"] * count, "--temperature=0")
        assert err == f"note: {subject}{note}"


def test_generate_continues_prompts_in_their_order(
    checkpoint: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = (checkpoint, "--max-new-tokens", 5)
    model = load_pretrained(checkpoint).model
    tokens = [TOKENIZER.encode(text) or [TOKENIZER.eod_id] for text in TEXTS]
    texts = [detokenize(TOKENIZER, c.tokens) for c in complete(model, tokens, 5, stop_ids=[TOKENIZER.eod_id])]
    shown, _ = run(capsys, *args, *(word for text in TEXTS for word in ("--prompt", text)))
    assert shown == "".join(f"--- {ask!r}\n{ask}{answer}\n\n" for ask, answer in zip(TEXTS, texts, strict=True))
    monkeypatch.setattr(sys, "stdin", io.StringIO("\ufeffthe king\nand\n"))  # a piped text is a prompt
    assert run(capsys, *args)[0] == run(capsys, *args, "--prompt=the king\nand")[0]
