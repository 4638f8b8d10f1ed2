"""`nlgmoe generate`: text generation from a checkpoint."""

from __future__ import annotations

import json as json_format
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nlgmoe.cli.arguments import check_device, check_output, import_allowed, write_whole
from nlgmoe.validation import SettingError

if TYPE_CHECKING:
    from nlgmoe.eval.generation import Completion, Sampling
    from nlgmoe.eval.loaded_model import LoadedModel


def generate_text(
    checkpoint: str,
    prompt: list[str] | None = None,
    prompts: str | None = None,
    output: str | None = None,
    max_new_tokens: int = 100,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    batch_size: int = 16,
    tokenizer: str | None = None,
    device: str = "cpu",
    precision: Literal["fp32", "bf16"] | None = None,
    json: bool = False,
    chat: bool = False,
    allow_code: list[str] | None = None,
) -> None:
    """Continue texts until a stop token, the end of the document, `max_new_tokens`, or `seq_len`; or answer them, with `--chat`.

    Args:
        checkpoint: the folder, `NAME.ckpt`, or a run folder: its newest valid checkpoint is used.
        prompt: text to continue; may be given several times. Default, without `prompts`: the text is read from stdin.
        prompts: file of JSON lines, each with a "prompt"; - is stdin.
        output: new file of JSON lines, one for each prompt, in their order; default: results are printed.
        max_new_tokens: maximum number of tokens to add to each prompt.
        temperature: divides the logits before sampling; 0 takes the most likely token.
        top_k: sample among this many most likely tokens.
        top_p: sample among the fewest most likely tokens whose probabilities sum to at least this.
        seed: seed of the sampling; the continuation of a prompt does not depend on the other prompts.
        batch_size: prompts per batch.
        tokenizer: as data.tokenizer, for a checkpoint without a tokenizer.
        device: device of the model, such as cuda.
        precision: precision of weights and matrix products, fp32 or bf16; default: the stored precision.
        json: print JSON lines instead of text.
        chat: each prompt is a message of the user, which the model answers: its chat template and stop tokens are used.
        allow_code: module of the checkpoint's router or expert to import; may be given several times.
    """
    import_allowed(allow_code)
    from nlgmoe.eval.generation import Sampling, check_prompts, complete  # these need torch
    from nlgmoe.eval.loaded_model import load_pretrained

    if prompt is not None and prompts is not None:
        raise SettingError(f"prompts={prompts} cannot be combined with prompt; leave one of them out")
    for name, number in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if number < 1:
            raise SettingError(f"{name}={number} must be at least 1")
    sampling = Sampling(temperature, top_k, top_p, seed)
    check_device(device)
    if output is not None:
        check_output(output)
    texts = _read_prompts(prompts) if prompts is not None else [_read_stdin()] if prompt is None else prompt

    loaded = load_pretrained(checkpoint, tokenizer, device, precision)
    if chat:
        from nlgmoe.eval.chat import chat_prompts

        tokens = chat_prompts(loaded.tokenizer, texts)
    else:
        tokens = [loaded.tokenizer.encode(text) or [loaded.tokenizer.eod_id] for text in texts]
    check_prompts(loaded.model, tokens, max_new_tokens)
    if len(texts) == 1 and output is None and not json:
        _print_while_generating(loaded, "" if chat else texts[0], tokens[0], max_new_tokens, sampling)
        return
    completions = complete(loaded.model, tokens, max_new_tokens, sampling, loaded.tokenizer.stop_ids, batch_size)
    records = [_record(loaded, text, completion) for text, completion in zip(texts, completions, strict=True)]
    if output is not None:
        write_whole(output, "".join(json_format.dumps(record, ensure_ascii=False) + "\n" for record in records))
        print(f"{len(records):,} completions written to {output}")
    else:
        for record in records:
            print(json_format.dumps(record, ensure_ascii=False) if json else _format_record(record, chat))
    if cut := sum(record["end"] == "seq_len" for record in records):
        _print_length_note(f"{cut:,} of {len(records):,} texts", loaded)


def _print_while_generating(
    loaded: LoadedModel, text: str, tokens: list[int], max_new_tokens: int, sampling: Sampling
) -> None:
    from nlgmoe.data.tokenizer import StreamingDetokenizer
    from nlgmoe.eval.generation import stream

    print(text, end="", flush=True)
    detokenizer, end = StreamingDetokenizer(loaded.tokenizer), None
    for new in stream(loaded.model, [tokens], max_new_tokens, sampling, loaded.tokenizer.stop_ids):
        print(detokenizer.add(new.token), end="", flush=True)
        end = new.end
    print(flush=True)
    if end == "seq_len":
        _print_length_note("the text", loaded)


def _print_length_note(subject: str, loaded: LoadedModel) -> None:
    length = loaded.model.config.seq_len
    print(f"note: {subject} ended before max_new_tokens, at the model's seq_len={length}", file=sys.stderr)


def _record(loaded: LoadedModel, prompt: str, completion: Completion) -> dict[str, Any]:
    from nlgmoe.data.tokenizer import detokenize

    return {
        "prompt": prompt,
        "completion": detokenize(loaded.tokenizer, completion.tokens),
        "tokens": completion.tokens,
        "log_prob": completion.log_prob,
        "end": completion.end,
    }


def _format_record(record: dict[str, Any], chat: bool) -> str:
    return f"--- {record['prompt']!r}\n{'' if chat else record['prompt']}{record['completion']}\n"


def _read_stdin() -> str:
    """Read one prompt; remove the line break that `echo` adds, and a byte order mark."""
    if sys.stdin is None or sys.stdin.isatty():  # None: closed
        raise SettingError("prompt=null: give a text with --prompt, a file with --prompts, or pipe one in")
    try:
        return sys.stdin.read().removesuffix("\n").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise SettingError("prompt: the text from stdin is not UTF-8") from error


def _read_prompts(path: str) -> list[str]:
    """Read the prompts of a file of JSON lines; skip empty lines."""
    source = "stdin" if path == "-" else path
    try:
        text = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise SettingError(f"prompts={source}: {error.strerror}; name a file of JSON lines, or - for stdin") from error
    except UnicodeDecodeError as error:
        raise SettingError(f'prompts={source} is not UTF-8; write JSON lines with a "prompt" each') from error
    prompts = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json_format.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
            raise SettingError(
                f'prompts={source}, line {number} is no JSON object with a text "prompt"; write {{"prompt": "..."}}'
            )
        prompts.append(record["prompt"])
    if not prompts:
        raise SettingError(f'prompts={source} has no prompt; write a line {{"prompt": "..."}} for each')
    return prompts
