"""Log-likelihoods and generated texts, compared with lm-eval's `hf` model with the same weights and with forward passes."""

import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers
import torch
from lm_eval.models.huggingface import HFLM
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from nlgmoe import load_model
from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.model.gpt import GPT
from nlgmoe.tools.hugging_face.export import export
from nlgmoe.tools.lm_eval.harness import EvaluatedGPT
from tests.support.checkpoints import write
from tests.support.gpt2 import as_theirs, our_name
from tests.support.tasks import TOKENIZER, WORDS, text

SEQ_LEN = 24
DENSE = GPTConfig(TOKENIZER.vocab_size, SEQ_LEN, 2, 32, 2, vocab_size_multiple=1)
PR_MOE = replace(DENSE, moe=MoEConfig([4], mlp_type="residual"))
UNTIL = {"until": ["e", " q"], "max_gen_toks": 7, "do_sample": False}


def theirs(gpt: GPT) -> HFLM:
    config = GPT2Config(
        vocab_size=TOKENIZER.vocab_size, n_positions=SEQ_LEN, n_embd=32, n_layer=2, n_head=2,
        activation_function="gelu_new", bos_token_id=TOKENIZER.eod_id, eos_token_id=TOKENIZER.eod_id,
    )  # fmt: skip
    model, values = GPT2LMHeadModel(config), dict(gpt.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = values[our_name(name)]
            parameter.copy_(value if name.endswith("wte.weight") else as_theirs(name, value))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(TOKENIZER.files["tokenizer.json"]), eos_token="<|endoftext|>"
    )
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3, device="cpu")


def requests(*arguments: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=each, task_name="tiny") for each in arguments]


CHOICES = (" a", " b", " no", " yes", " nobody")  # read together where they can be
PAIRS = [
    *((text(n, 1 + 3 * n), " " + text(n + 1, 1 + n % 3)) for n in range(9)),  # the longest are cut from the left
    *(("is it the king?", choice) for choice in CHOICES),
    ("", "the king"),
    ("the king ", "saw"),  # the space goes to the continuation
]


def exported(checkpoint: Path) -> HFLM:
    folder = checkpoint.with_suffix("")
    export(checkpoint, folder)
    return HFLM(pretrained=str(folder), trust_remote_code=True, batch_size=3, device="cpu", dtype="float32")


@pytest.fixture(scope="module", params=["GPT-2", "an exported PR-MoE"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[EvaluatedGPT, HFLM]:
    dense, path = request.param == "GPT-2", tmp_path_factory.mktemp("models") / "a.ckpt"
    gpt = load_model(write(path, DENSE if dense else PR_MOE, tokenizer=TOKENIZER.files)).eval()
    return EvaluatedGPT(gpt, TOKENIZER, batch_size=4), theirs(gpt) if dense else exported(path)


def test_log_likelihoods_are_those_of_lm_evals_hf_model(pair: tuple[EvaluatedGPT, HFLM]) -> None:
    assert max(len(TOKENIZER.encode(context)) for context, _ in PAIRS) > SEQ_LEN
    ours, expected = (lm.loglikelihood(requests(*PAIRS), disable_tqdm=True) for lm in pair)
    assert [nats for nats, _ in ours] == pytest.approx([nats for nats, _ in expected], rel=1e-6)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in expected]


def test_whole_texts_are_those_of_lm_evals_hf_model(pair: tuple[EvaluatedGPT, HFLM]) -> None:
    # Not periodic: where two windows read the same and score different numbers of tokens, `hf` takes the wrong positions.
    draw = random.Random(1)
    texts = requests(*((" ".join(draw.choices(WORDS, k=words)),) for words in (1, 8, 40, 77)), ("",))
    ours, expected = (lm.loglikelihood_rolling(texts, disable_tqdm=True) for lm in pair)
    assert ours == pytest.approx(expected, rel=1e-6)
    assert len(TOKENIZER.encode(texts[3].args[0])) > 3 * SEQ_LEN
    # A continuation longer than the model, which `hf` rejects, is scored like a whole text.
    (long, _), (short, _) = pair[0].loglikelihood(requests(("", texts[3].args[0]), PAIRS[0]), disable_tqdm=True)
    ((expected_short, _),) = pair[1].loglikelihood(requests(PAIRS[0]), disable_tqdm=True)
    assert (long, short) == pytest.approx((expected[3], expected_short), rel=1e-6)


def test_generated_texts_are_those_of_lm_evals_hf_model(pair: tuple[EvaluatedGPT, HFLM]) -> None:
    prompts = requests(*((text(n, 1 + 2 * n), UNTIL) for n in range(8)), ("a b", {"until": [], "max_gen_toks": 20}))
    ours, expected = (lm.generate_until(prompts, disable_tqdm=True) for lm in pair)
    assert ours == expected
    assert len(set(ours)) > 4
