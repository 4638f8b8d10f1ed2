"""Generation, compared with forward passes of each sequence alone, and sampling, compared with its distribution."""

import copy
import math
from collections.abc import Sequence
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.data.tokenizer import PROBE, StreamingDetokenizer, detokenize
from nlgmoe.eval.generation import Completion, Sampling, complete, generate, stream
from nlgmoe.model.gpt import GPT
from tests.support.checkpoints import TOKENIZER

VOCAB, SEQ_LEN = 61, 24
CONFIG = GPTConfig(VOCAB, SEQ_LEN, 4, 32, 2, init_std=0.1, moe=MoEConfig([2, 4], mlp_type="residual"))
MODEL = GPT(CONFIG, seed=3).eval()
PROMPTS = [[5, 9, 2], [7, 7, 1, 30, 2, 8], [4], [5, 9, 2]]
GREEDY = Sampling(temperature=0)


@torch.no_grad()
def read_again(prompt: Sequence[int], new: int) -> list[int]:
    """Greedy continuation without a cache."""
    tokens = torch.tensor([prompt])
    for _ in range(new):
        likeliest = MODEL.logits(MODEL(tokens).hidden[:, -1]).argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, likeliest], dim=1)
    ids: list[int] = tokens[0].tolist()
    return ids


def test_greedy_tokens_are_those_of_reading_each_sequence_again_alone() -> None:
    assert generate(MODEL, PROMPTS, 12, temperature=0) == [read_again(prompt, 12) for prompt in PROMPTS]


prompts_of_any_length = st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20), min_size=1, max_size=5)


@settings(max_examples=8)
@given(prompts_of_any_length, st.randoms(use_true_random=False), st.integers(0, 3))
def test_generated_texts_do_not_depend_on_batches_or_order(prompts: list[list[int]], random: Random, seed: int) -> None:
    sampling, stop = Sampling(1.2, top_k=30, top_p=0.9, seed=seed), {11, 40}
    together = complete(MODEL, prompts, 12, sampling, stop)
    order = random.sample(range(len(prompts)), len(prompts))
    in_order = complete(MODEL, [prompts[i] for i in order], 12, sampling, stop, batch_size=2)

    assert sorted(c.tokens for c in in_order) == sorted(c.tokens for c in together)
    for number, (prompt, completion) in enumerate(zip(prompts, together, strict=True)):
        assert completion.end == end_of(prompt, completion, stop, 12)
        if prompt not in prompts[:number]:  # equal prompts draw different texts; the first one's is that of one alone
            (alone,) = complete(MODEL, [prompt], 12, sampling, stop)
            assert (alone.tokens, alone.end) == (completion.tokens, completion.end)


def end_of(prompt: list[int], completion: Completion, stop: set[int], most: int) -> str:
    assert stop.isdisjoint(completion.tokens[:-1]) and len(completion.tokens) <= most
    if completion.tokens[-1] in stop:
        return "stop"
    if len(completion.tokens) == most:
        return "max_new_tokens"
    assert len(prompt) + len(completion.tokens) == SEQ_LEN
    return "seq_len"


def test_sampled_texts_of_equal_prompts_differ_and_follow_the_seed() -> None:
    one, two = (complete(MODEL, [[5, 9]] * 3, 10, Sampling(seed=seed)) for seed in (1, 2))
    assert len({tuple(completion.tokens) for completion in one + two}) == 6


def test_generated_tokens_come_one_by_one() -> None:
    calls: list[torch.Size] = []
    handle = MODEL.register_forward_pre_hook(lambda _, args: calls.append(args[0].shape))
    tokens = stream(MODEL, PROMPTS[:2], 3, GREEDY)
    first = [next(tokens), next(tokens)]
    assert ([new.sequence for new in first], calls) == ([0, 1], [(2, 6)])
    assert len(list(tokens)) == 4
    assert calls == [(2, 6), (2, 1), (2, 1)]  # nothing is read twice
    handle.remove()


def test_sampling_follows_the_distribution() -> None:
    logits = torch.randn(1, 9, generator=torch.Generator().manual_seed(0)) * 2
    ends = Sampling(1e-9), Sampling(top_k=1), Sampling(top_p=1e-9), Sampling(1e6, top_k=99, top_p=1.0)
    for sampling in (Sampling(), Sampling(0.7), Sampling(1.5, top_k=4), Sampling(top_p=0.8), *ends):
        generators = sampling.generators([[1]] * 8_000)
        drawn = torch.bincount(sampling.sample(logits.expand(8_000, -1), generators), minlength=9) / 8_000
        kept = TopKLogitsWarper(sampling.top_k or 9)(None, TemperatureLogitsWarper(sampling.temperature)(None, logits))
        expected = TopPLogitsWarper(sampling.top_p or 1.0)(None, kept)[0].softmax(-1)
        assert (drawn - expected).abs().max() < 0.02 and not drawn[expected == 0].any()


def test_generation_refuses_impossible_requests() -> None:
    for wrong, message in (
        ({"top_p": 0.0}, "top_p=0.0 must"),
        ({"prompts": [[1], []]}, "prompt 2 is empty"),
        ({"prompts": [[1], [1] * 24]}, "prompt 2 has 24 tokens, and with seq_len=24 the model reads at most 23"),
        ({"prompts": [[61]]}, "prompt 1 has token ids outside"),
        ({"model": GPT(MODEL.config)}, "training mode"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(**({"model": MODEL, "prompts": PROMPTS, "max_new_tokens": 1} | wrong))  # type: ignore[arg-type]


def test_generation_ends_at_logits_that_are_not_finite_and_names_the_weight() -> None:
    broken = copy.deepcopy(MODEL)
    with torch.no_grad():
        broken.blocks[1].moe.experts.down_bias[:, 3] = math.nan
    message = r"logits are NaN or infinite: the weight blocks.1.moe.experts.down_bias is not"
    with pytest.raises(ValueError, match=message):
        generate(broken, PROMPTS, 1)


def test_streamed_text_has_only_complete_characters() -> None:
    ids = TOKENIZER.encode(PROBE)  # bytes, mostly
    assert b"".join(map(TOKENIZER.spell, ids)) == PROBE.encode()
    assert [len(TOKENIZER.spell(i)) for i in range(TOKENIZER.vocab_size)] == TOKENIZER.token_bytes.tolist()
    detokenizer = StreamingDetokenizer(TOKENIZER)
    pieces = [detokenizer.add(token) for token in ids]
    assert "".join(pieces) == PROBE and "" in pieces
    for length in range(len(ids)):  # cut within a character: that one is left out
        assert PROBE.startswith(detokenize(TOKENIZER, ids[:length]))
    assert detokenize(TOKENIZER, [TOKENIZER.eod_id, *TOKENIZER.encode("a"), 9999]) == "a"
