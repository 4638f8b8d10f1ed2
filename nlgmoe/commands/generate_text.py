"""`nlgmoe generate`: text generation from a checkpoint."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Literal

from nlgmoe.cli.arguments import check_device, import_allowed
from nlgmoe.validation import SettingError, require

if TYPE_CHECKING:
    from nlgmoe.eval.generation import Sampling
    from nlgmoe.eval.loaded_model import LoadedModel


def generate_text(
    checkpoint: str,
    prompt: list[str] | None = None,
    max_new_tokens: int = 100,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    tokenizer: str | None = None,
    device: str = "cpu",
    precision: Literal["fp32", "bf16"] | None = None,
    chat: bool = False,
    without: list[str] | None = None,
    removal: Literal["route_around", "contribution"] = "route_around",
    experts_per_token: int | None = None,
    allow_code: list[str] | None = None,
) -> None:
    """Continue texts until a stop token, the end of the document, `max_new_tokens`, or `seq_len`; or answer them, with `--chat`.

    Args:
        checkpoint: the folder, `NAME.ckpt`, or a run folder: its newest valid checkpoint is used.
        prompt: text to continue; may be given several times. Default: the text is read from stdin.
        max_new_tokens: maximum number of tokens to add to each prompt.
        temperature: divides the logits before sampling; 0 takes the most likely token.
        top_k: sample among this many most likely tokens.
        top_p: sample among the fewest most likely tokens whose probabilities sum to at least this.
        seed: seed of the sampling; the continuation of a prompt does not depend on the other prompts.
        tokenizer: as data.tokenizer, for a checkpoint without a tokenizer.
        device: device of the model, such as cuda.
        precision: precision of weights and matrix products, fp32 or bf16; default: the stored precision.
        chat: each prompt is a message of the user, which the model answers: its chat template and stop tokens are used.
        without: experts to remove, LAYER:EXPERT,EXPERT such as 0:3,7 (MoE layers and experts are counted from 0); may be given
            several times.
        removal: route_around: other experts take their tokens, as in a pruned model; contribution: their output is 0.
        experts_per_token: in place of the model's model.config.moe.top_k.
        allow_code: module of the checkpoint's router, expert or attention to import; may be given several times.
    """
    import_allowed(allow_code)
    from nlgmoe.data.tokenizer import detokenize  # these need torch
    from nlgmoe.eval.generation import Sampling, check_prompts, complete
    from nlgmoe.eval.loaded_model import load_pretrained

    require(max_new_tokens >= 1, f"max_new_tokens={max_new_tokens} must be at least 1")
    sampling = Sampling(temperature, top_k, top_p, seed)
    check_device(device)
    texts = [_read_stdin()] if prompt is None else prompt

    changes: dict[str, Any] = {"without": without or (), "removal": removal, "experts_per_token": experts_per_token}
    loaded = load_pretrained(checkpoint, tokenizer, device, precision, **changes)
    if chat:
        from nlgmoe.eval.chat import chat_prompts

        tokens = chat_prompts(loaded.tokenizer, texts)
    else:
        tokens = [loaded.tokenizer.encode(text) or [loaded.tokenizer.eod_id] for text in texts]
    check_prompts(loaded.model, tokens, max_new_tokens)
    if len(texts) == 1:
        _print_while_generating(loaded, "" if chat else texts[0], tokens[0], max_new_tokens, sampling)
        return
    completions = complete(loaded.model, tokens, max_new_tokens, sampling, loaded.tokenizer.stop_ids)
    for text, completion in zip(texts, completions, strict=True):
        print(f"--- {text!r}\n{'' if chat else text}{detokenize(loaded.tokenizer, completion.tokens)}\n")
    if cut := sum(completion.end == "seq_len" for completion in completions):
        _print_length_note(f"{cut:,} of {len(texts):,} texts", loaded)


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


def _read_stdin() -> str:
    """Read one prompt; remove the line break that `echo` adds, and a byte order mark."""
    if sys.stdin is None or sys.stdin.isatty():  # None: closed
        raise SettingError("prompt=null: give a text with --prompt, or pipe one in")
    try:
        return sys.stdin.read().removesuffix("\n").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise SettingError("prompt: the text from stdin is not UTF-8") from error
