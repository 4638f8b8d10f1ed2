"""`nlgmoe generate`, from a checkpoint to what is printed or written; in this process, since imports cost seconds."""

import io
import json
import sys
from pathlib import Path

import pytest

from nlgmoe.checkpoint.portable import PortableCheckpointIO
from nlgmoe.commands.main import main
from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.data.tokenizer import Tokenizer, detokenize, train_byte_level_bpe
from nlgmoe.eval.generation import complete, generate
from nlgmoe.eval.loaded_model import load_pretrained
from nlgmoe.module import MoEGPTModule

TOKENIZER = Tokenizer(train_byte_level_bpe(iter(["the king and the queen"] * 3), 300), "tiny")
TEXTS = ["the king", "", "null", "日本 and the king", 'the "queen"\n', "1 + 1 =", "!and the king"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "checkpoints/step-0.ckpt"
    module = MoEGPTModule(GPTConfig(TOKENIZER.vocab_size, 32, 2, 16, 2, init_std=0.3, moe=MoEConfig(4)))
    module.configure_model()
    state = {"state_dict": module.state_dict(), "model_config": module.config.to_dict()}
    state |= {"tokenizer": TOKENIZER.files, "global_step": 0, "tokens_seen": 0, "seed": 1}
    PortableCheckpointIO().save_checkpoint(state, folder)
    return folder


def run(capsys: pytest.CaptureFixture, *args: object) -> tuple[str, str]:
    main(["generate", *map(str, args)])
    found = capsys.readouterr()
    return found.out, found.err


def test_one_prompt_is_printed_as_it_goes_on(checkpoint: Path, capsys: pytest.CaptureFixture) -> None:
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


def test_it_says_where_the_model_can_read_no_further(checkpoint: Path, capsys: pytest.CaptureFixture) -> None:
    out, err = run(capsys, checkpoint, "--prompt", "the king", "--temperature=0", "--json")
    record = json.loads(out)
    room = 32 - len(TOKENIZER.encode("the king"))
    assert (record["end"], len(record["tokens"])) == ("seq_len", room)
    assert err == "note: 1 of 1 texts ended before max_new_tokens, at the model's seq_len=32\n"


def test_a_file_of_prompts_becomes_a_file_of_completions(
    checkpoint: Path, capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = "\n\n".join(json.dumps({"prompt": text, "id": 1}) for text in TEXTS)
    (tmp_path / "in.jsonl").write_text(lines)
    args = (checkpoint, "--max-new-tokens", 5, "--batch-size", 3)
    out, _ = run(capsys, *args, "--prompts", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    assert out == f"{len(TEXTS)} completions written to {tmp_path / 'out.jsonl'}\n"
    written = (tmp_path / "out.jsonl").read_text()
    records = [json.loads(line) for line in written.splitlines()]
    assert [record["prompt"] for record in records] == TEXTS  # in their order
    model = load_pretrained(checkpoint).model
    tokens = [TOKENIZER.encode(text) or [TOKENIZER.eod_id] for text in TEXTS]
    expected = complete(model, tokens, 5, stop_ids=[TOKENIZER.eod_id])
    assert [record["tokens"] for record in records] == [completion.tokens for completion in expected]
    assert [record["log_prob"] for record in records] == pytest.approx([c.log_prob for c in expected], abs=1e-4)
    assert [record["completion"] for record in records] == [detokenize(TOKENIZER, c.tokens) for c in expected]

    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    assert run(capsys, *args, "--prompts", "-", "--json")[0] == written
    monkeypatch.setattr(sys, "stdin", io.StringIO("\ufeffthe king\nand\n"))  # a piped text is a prompt
    assert run(capsys, *args)[0] == run(capsys, *args, "--prompt=the king\nand")[0]
    asked = [part for text in TEXTS for part in ("--prompt", text)]
    assert run(capsys, *args, *asked, "--json")[0] == written
    shown, _ = run(capsys, *args, *asked)
    assert all(f"--- {r['prompt']!r}\n{r['prompt']}{r['completion']}\n" in shown for r in records)


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("CKPT", "--prompt", "queen " * 40), 2, "with seq_len=32 the model reads at most 31"),
        (("CKPT", "--prompt=a", "--device=abacus"), 2, "device=abacus cannot be used"),
        (("CKPT", "--prompts", "TMP/text.jsonl"), 2, 'text.jsonl, line 2 is no JSON object with a text "prompt"'),
        (("TMP", "--prompt=a"), 1, "no valid checkpoint"),
        (("CKPT",), 2, "give a text with --prompt"),
    ],
)
def test_mistakes_end_with_one_line(
    args: tuple[str, ...], code: int, message: str, checkpoint: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (tmp_path / "text.jsonl").write_text('{"prompt": "a"}\nthe king\n')
    (tmp_path / "checkpoints/step-1.ckpt").mkdir(parents=True)  # damaged
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", terminal)
    with pytest.raises(SystemExit) as end:
        run(capsys, *(arg.replace("CKPT", str(checkpoint)).replace("TMP", str(tmp_path)) for arg in args))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
    assert end.value.code == code
