"""Log-likelihoods and generated texts, compared with lm-eval's `hf` model of the exported folder."""

import random
from types import SimpleNamespace
from typing import Any

import pytest
from lm_eval.models.huggingface import HFLM

from nlgmoe import load_model
from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.tools.hugging_face.export import export
from nlgmoe.tools.lm_eval.harness import EvaluatedGPT
from tests.support.checkpoints import write
from tests.support.tasks import TOKENIZER, WORDS, text

SEQ_LEN = 24
PR_MOE = GPTConfig(TOKENIZER.vocab_size, SEQ_LEN, 2, 32, 2, moe=MoEConfig([4], mlp_type="residual"))  # a padded table
UNTIL = {"until": ["e", " q"], "max_gen_toks": 7, "do_sample": False}


def requests(*arguments: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=each, task_name="tiny") for each in arguments]


CHOICES = (" a", " b", " no", " yes", " nobody")  # read together where they can be
PAIRS = [
    *((text(n, 1 + 3 * n), " " + text(n + 1, 1 + n % 3)) for n in range(9)),  # the longest are cut from the left
    *(("is it the king?", choice) for choice in CHOICES),
    ("", "the king"),
    ("the king ", "saw"),  # the space goes to the continuation
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[EvaluatedGPT, HFLM]:
    folder = tmp_path_factory.mktemp("models")
    checkpoint = write(folder / "a.ckpt", PR_MOE, tokenizer=TOKENIZER.files)
    export(checkpoint, folder / "a")
    theirs = HFLM(pretrained=str(folder / "a"), trust_remote_code=True, batch_size=3, device="cpu", dtype="float32")
    return EvaluatedGPT(load_model(checkpoint).eval(), TOKENIZER, batch_size=4), theirs


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
