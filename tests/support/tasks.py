"""Tasks of a few documents in lm-eval's YAML, one for each kind of request, and data with a tokenizer that can read them."""

import json
from pathlib import Path

from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.data.tokenizer import Tokenizer
from nlgmoe.data.tokenizer_loading import train_byte_level_bpe
from tests.support.synthetic import SyntheticData

SENTENCE = "the king and the queen saw a red fox and a blue bird near the old stone house by the river"
WORDS = SENTENCE.split()
TOKENIZER = Tokenizer(train_byte_level_bpe(iter([SENTENCE] * 3), 300), "tiny")
CONFIG = GPTConfig(TOKENIZER.vocab_size, 24, 2, 16, 2, init_std=0.2, moe=MoEConfig(4))


def text(number: int, words: int) -> str:
    """Some words, others for every number."""
    return " ".join(WORDS[(number * 7 + index * (number + 3)) % len(WORDS)] for index in range(words))


TASKS = {
    "tiny_choice": (
        """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
        [
            {"question": text(n, 4 + 5 * (n % 3)), "choices": [text(n + k, 1 + k) for k in range(3)], "answer": n % 2}
            for n in range(9)
        ],
    ),
    "tiny_word": (
        """
output_type: loglikelihood
doc_to_text: "{{text.split(' ')[:-1]|join(' ')}}"
doc_to_target: "{{' '+text.split(' ')[-1]}}"
metric_list: [{metric: perplexity, aggregation: perplexity, higher_is_better: false}]
""",
        [{"text": text(n, 3 + n)} for n in range(5)],
    ),
    "tiny_answer": (
        """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["e"], max_gen_toks: 6}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
        [{"question": text(n, 2 + n), "answer": "the"} for n in range(5)],
    ),
    "tiny_text": (
        """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}]
""",
        [{"text": text(n, 10 + 20 * (n % 2))} for n in range(3)],
    ),
}


def write_tasks(folder: Path) -> Path:
    """Write the tasks' YAML, and their documents where it says."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (yaml, documents) in TASKS.items():
        file = folder / f"{name}_documents.jsonl"
        file.write_text("".join(json.dumps(document) + "\n" for document in documents))
        where = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: '{file}'}}}}\ntest_split: test\n"
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{where}{yaml.lstrip()}")
    return folder


class TokenizedData(SyntheticData):
    tokenizer = TOKENIZER
