"""Tasks from files, their results, and the command."""

import json
import re
import sys
from pathlib import Path
from textwrap import dedent
from types import SimpleNamespace
from typing import Any

import pytest
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from nlgmoe import MoEGPTModule, load_pretrained
from nlgmoe.commands.main import main
from nlgmoe.eval.interventions import remove_experts
from nlgmoe.model.gpt import GPT
from nlgmoe.tools.lm_eval.harness import EvaluatedGPT, Tasks
from nlgmoe.validation import SettingError
from tests.support.commands import error_of
from tests.support.tasks import CONFIG, TASKS, TOKENIZER, TokenizedData, text, write_tasks
from tests.support.trainers import trainer

PIQA = [{"goal": text(n, 3), "sol1": text(n, 4), "sol2": text(n + 1, 5), "label": int(n > 1)} for n in range(6)]


@pytest.fixture(scope="module")
def lm() -> EvaluatedGPT:
    return EvaluatedGPT(GPT(CONFIG, seed=2).eval(), TOKENIZER, 4)


@pytest.fixture(scope="module")
def documented(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the task in docs/evaluation.md."""
    folder = tmp_path_factory.mktemp("documented")
    (folder / "piqa.jsonl").write_text("".join(json.dumps(each) + "\n" for each in PIQA))
    text = (Path(__file__).parents[2] / "docs/evaluation.md").read_text()
    task = "".join(re.findall(r"^    task: piqa\n(?:    .*\n)*", text, re.MULTILINE))
    (folder / "piqa.yaml").write_text(dedent(task).replace("data/eval", str(folder)))
    return folder


def run_task(lm: EvaluatedGPT, name: str, folder: Path, limit: int | None = None) -> dict[str, Any]:
    return Tasks([name], str(folder), limit).evaluate(lm, name, bootstrap_iters=10)


def test_a_task_of_a_local_file_scores_its_documents(lm: EvaluatedGPT, documented: Path) -> None:
    results = run_task(lm, "piqa", documented)
    right = []
    for document in PIQA:
        question = f"Question: {document['goal']}\nAnswer:"
        arguments = [(question, f" {document[solution]}") for solution in ("sol1", "sol2")]
        (first, _), (second, _) = lm.loglikelihood([SimpleNamespace(args=each) for each in arguments])
        right.append((second > first) == document["label"])
    accuracy = sum(right) / 6
    assert results["results"]["piqa"]["acc,none"] == pytest.approx(accuracy)
    assert results["results"]["piqa"]["acc_stderr,none"] == pytest.approx((accuracy * (1 - accuracy) / 5) ** 0.5)
    assert results["n-samples"]["piqa"] == {"original": 6, "effective": 6}


def test_zero_shot_results_are_those_of_lm_evals_simple_evaluate(lm: EvaluatedGPT, tmp_path: Path) -> None:
    folder = write_tasks(tmp_path)
    manager = TaskManager(include_path=folder, include_defaults=False)
    for name in TASKS:  # with two examples before each document
        with (folder / f"{name}.yaml").open("a") as file:
            file.write("num_fewshot: 2\n")
    settings = {"limit": 4, "bootstrap_iters": 10, "log_samples": False}
    theirs = simple_evaluate(lm, tasks=list(TASKS), task_manager=manager, **settings)
    for name in TASKS:
        ours = run_task(lm, name, folder, limit=4)["results"][name]
        for key, value in theirs["results"][name].items():
            assert ours.pop(key) == (pytest.approx(value, 1e-6) if isinstance(value, float) else value)
        assert not ours


def test_zero_shot_mistakes_are_named_with_the_remedy(tmp_path: Path) -> None:
    write_tasks(tmp_path)
    (tmp_path / "tiny_choice_documents.jsonl").write_text('{"question": "no choices"}\n')
    (tmp_path / "tiny_text_documents.jsonl").unlink()
    for name, reason in {"tiny_choice": "choices", "tiny_text": "tiny_text_documents.jsonl"}.items():
        with pytest.raises(SettingError, match=rf"tasks={name}: lm-eval cannot load it \(.*{reason}.*include_path"):
            Tasks([name], str(tmp_path)).load(name)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    one_step = trainer(folder, max_steps=1)
    one_step.fit(MoEGPTModule(CONFIG), TokenizedData())
    one_step.save_checkpoint(folder / "checkpoints/step-1.ckpt")
    return folder


def test_zero_shot_command_writes_results_and_a_table(
    run: Path, documented: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.json"
    arguments = ["--tasks", "piqa", "--include-path", str(documented), "--limit", "4", "--device", "cpu"]
    main(["evaluate", str(run), *arguments, "--output", str(output)])
    written = json.loads(output.read_text())
    about = written["nlgmoe"]
    assert (about["checkpoint"], about["step"], about["limit"]) == (str(run / "checkpoints/step-1.ckpt"), 1, 4)
    assert about["parameters"] > about["active_parameters"] > 0 and about["versions"]["lm_eval"].startswith("0.4.")
    assert about["tokens"] == 64
    assert 0 <= written["results"]["piqa"]["acc,none"] <= 1
    shown = capsys.readouterr().out
    assert "limit 4" in shown and re.search(r"\|piqa *\|.*\|acc +\|", shown)


def test_a_model_without_experts_is_evaluated(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, scores = write_tasks(tmp_path), []
    for more in ([], ["--without=0:1,3"], ["--without=0:1,3", "--removal=contribution"], ["--experts-per-token=2"]):
        output = tmp_path / f"{len(scores)}.json"
        words = ["--tasks=tiny_text", f"--include-path={folder}", "--device=cpu", f"--output={output}"]
        main(["evaluate", str(run), *words, *more])
        written = json.loads(output.read_text())
        scores.append(written["results"]["tiny_text"]["bits_per_byte,none"])
        assert written["nlgmoe"].get("without") == (["0:1,3"] if "--without=0:1,3" in more else None)
    assert len(set(scores)) == 4
    assert "without experts 0:1,3 (contribution)" in capsys.readouterr().out
    model = load_pretrained(run).model
    with remove_experts(model, {0: [1, 3]}):
        expected = run_task(EvaluatedGPT(model, TOKENIZER, 4), "tiny_text", folder)
    assert scores[1] == pytest.approx(expected["results"]["tiny_text"]["bits_per_byte,none"], rel=1e-6)


def test_zero_shot_without_lm_eval_names_the_remedy(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    monkeypatch.delitem(sys.modules, "nlgmoe.tools.lm_eval.harness")
    assert "needs lm-eval (lm_eval.evaluator is missing): pip install -e '.[eval]'" in error_of(capsys, "evaluate", run)
