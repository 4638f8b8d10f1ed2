"""The last step of a run is saved for all settings of ModelCheckpoint."""

import json
import shutil
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from lightning import Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping, LambdaCallback, ModelCheckpoint, Timer

from nlgmoe.callbacks import RunSummary, SaveAtEnd
from nlgmoe.checkpoint.folder import read_document
from tests.checkpoint.runs import ACCUMULATE, SaveAt, fit
from tests.synthetic import SyntheticData


def steps(folder: Path) -> dict[str, int]:
    return {path.name: read_document(path)["global_step"] for path in folder.glob("*.ckpt")}


@pytest.mark.parametrize(
    ("keeper", "found"),
    [
        ({"every_n_train_steps": 3, "save_last": True}, {"step=6.ckpt": 6, "last.ckpt": 8}),
        ({"every_n_train_steps": 3, "save_last": "link"}, {"step=6.ckpt": 6, "last.ckpt": 8}),
        ({"every_n_train_steps": 3}, {"step=6.ckpt": 6, "last.ckpt": 8}),
        ({"every_n_train_steps": 4, "save_last": True}, {"step=8.ckpt": 8, "last.ckpt": 8}),
        ({"every_n_train_steps": 4}, {"step=8.ckpt": 8}),  # the end is there under its own name
        ({"every_n_train_steps": 4, "save_weights_only": True}, {"step=8.ckpt": 8, "last.ckpt": 8}),
        ({"monitor": "val/loss", "mode": "max", "save_last": True}, {"step=4.ckpt": 4, "last.ckpt": 8}),
    ],
    ids=str,
)
def test_the_last_step_is_saved_once(keeper: dict, found: dict[str, int], tmp_path: Path) -> None:
    fit(tmp_path, ModelCheckpoint(tmp_path / "all", "{step}", **keeper), SaveAtEnd())
    assert steps(tmp_path / "all") == found


def test_a_last_checkpoint_that_has_fallen_behind_is_replaced(tmp_path: Path) -> None:
    keeper = {"every_n_train_steps": 4}
    fit(tmp_path, ModelCheckpoint(tmp_path, "{step}", **keeper), SaveAtEnd(), steps=2)
    assert steps(tmp_path) == {"last.ckpt": 2}
    fit(tmp_path, ModelCheckpoint(tmp_path, "{step}", **keeper), SaveAtEnd(), steps=8, resume=tmp_path)
    assert steps(tmp_path) == {"last.ckpt": 8, "step=8.ckpt": 8}


def test_a_run_that_goes_back_saves_its_own_end(tmp_path: Path) -> None:
    last = tmp_path / "last.ckpt"

    def saved_at(resume: Path | None) -> str:
        keeper = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=4, enable_version_counter=False)
        fit(tmp_path, keeper, SaveAtEnd(), steps=6, resume=resume)
        return str(read_document(last)["saved_at"])

    first = saved_at(None)
    assert saved_at(last) == first  # it was at its end
    assert saved_at(tmp_path / "step=4.ckpt") > first


def test_a_run_that_goes_back_replaces_the_end_of_the_other_branch(tmp_path: Path) -> None:
    """Also where another `ModelCheckpoint` has saved its last step."""
    for mode, resume in (("min", None), ("max", tmp_path / "4.ckpt")):
        best = ModelCheckpoint(tmp_path / "best", f"{mode}-{{step}}", monitor="train/tokens", mode=mode)
        keeper = ModelCheckpoint(tmp_path / "all", every_n_train_steps=5)
        fit(tmp_path, keeper, best, SaveAt(4 * ACCUMULATE, tmp_path / "4.ckpt"), SaveAtEnd(), steps=8, resume=resume)
        assert steps(tmp_path / "all")["last.ckpt"] == 8
    ends = [read_document(tmp_path / name) for name in ("all/last.ckpt", "best/max-step=8.ckpt")]
    assert ends[0]["fit"] == ends[1]["fit"]


def test_a_trainer_that_goes_back_saves_its_steps_again(tmp_path: Path) -> None:
    keeper = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=8, save_top_k=-1)
    trainer = fit(tmp_path, keeper, SaveAt(4 * ACCUMULATE, tmp_path / "back.ckpt"), SaveAtEnd())
    trainer.fit(trainer.lightning_module, SyntheticData(), ckpt_path=tmp_path / "back.ckpt")
    assert steps(tmp_path) == {"back.ckpt": 4, "step=8.ckpt": 8, "step=8-v1.ckpt": 8}


def test_the_best_checkpoints_stay_when_a_run_is_validated_again(tmp_path: Path) -> None:
    def kept() -> dict[str, int]:
        keeper = ModelCheckpoint(
            tmp_path, "best-{step}", monitor="val/loss", save_top_k=2, enable_version_counter=False
        )
        resume = tmp_path if any(tmp_path.iterdir()) else None
        fit(tmp_path, keeper, SaveAtEnd(), resume=resume)
        return steps(tmp_path)

    first = kept()
    assert sorted(first.values()) == [4, 8]
    assert kept().items() >= first.items()


@pytest.mark.parametrize("best_first", [True, False])
def test_a_resumed_run_keeps_the_best_steps_of_an_undisturbed_one(best_first: bool, tmp_path: Path) -> None:
    """Lightning counts the resumed step until the next one ends, in three micro-batches here: it was judged in each."""

    def kept(folder: Path, *callbacks: Callback, resume: Path | None = None) -> dict[str, int]:
        best = ModelCheckpoint(
            folder / "best",
            "{step}",
            monitor="train/loss",
            save_top_k=2,
            every_n_train_steps=1,
            enable_version_counter=False,
        )
        every = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
        fit(folder, *([best, every] if best_first else [every, best]), *callbacks, resume=resume)
        return steps(folder / "best")

    undisturbed = kept(tmp_path)
    for step in (5, 7):
        folder = tmp_path / str(step)
        crash = LambdaCallback(on_train_batch_start=lambda trainer, *_: 1 / (step - trainer.global_step))  # noqa: B023
        with pytest.raises(ZeroDivisionError):
            kept(folder, crash)
        assert kept(folder, resume=folder / f"step={step}.ckpt") == undisturbed


def test_the_end_is_saved_into_another_folder_too(tmp_path: Path) -> None:
    for folder, resume in (("a", None), ("b", tmp_path / "a/step=8.ckpt")):
        keeper = ModelCheckpoint(tmp_path / folder, "{step}", every_n_train_steps=4)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is at its end
            fit(tmp_path / folder, keeper, SaveAtEnd(), resume=resume)
    assert steps(tmp_path / "b") == {"last.ckpt": 8}


def test_a_keeper_of_steps_repeats_no_validation(tmp_path: Path) -> None:
    """It stands behind the keeper that wrote the checkpoint, and does nothing after validations."""

    def validated(resume: Path | None = None) -> list[int]:
        seen: list[int] = []
        notes = LambdaCallback(on_validation_end=lambda trainer, _: seen.append(trainer.global_step))
        best = ModelCheckpoint(tmp_path / "best", "{step}", monitor="val/loss", save_top_k=-1)
        every = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
        fit(tmp_path, notes, best, every, resume=resume)
        return seen

    assert validated() == [4, 8]
    assert validated(tmp_path / "best/step=4.ckpt") == [8]


@pytest.mark.parametrize("killed_at", [4, 8])
def test_keepers_that_a_kill_left_out_see_the_validation_again(killed_at: int, tmp_path: Path) -> None:
    """Killed when the first of three had saved, and again when the second had; also in the validation at the end of a run."""

    def kept(folder: Path, kill: int | None, resume: Path | None = None) -> list[dict[str, int]]:
        keepers = [
            ModelCheckpoint(folder / name, "{step}", monitor=name, save_top_k=-1, enable_version_counter=False)
            for name in ("val/perplexity", "val/loss", "val/loss/odd")
        ]
        stopper = EarlyStopping("val/loss", min_delta=100, patience=2)  # a step counted twice would end the run

        def killed(trainer: Trainer, path: str) -> None:
            if trainer.global_step == killed_at:
                raise KeyError(path)
            ModelCheckpoint._save_checkpoint(keepers[kill or 0], trainer, path)

        if kill is not None:
            keepers[kill]._save_checkpoint = killed  # type: ignore[method-assign]
            with pytest.raises(KeyError):
                fit(folder, stopper, *keepers, steps=8, resume=resume)
        else:
            fit(folder, stopper, *keepers, steps=8, resume=resume)
            assert stopper.wait_count == 1
        return [steps(Path(str(one.dirpath))) for one in keepers]

    undisturbed = kept(tmp_path / "whole", kill=None)
    assert [sorted(found.values()) for found in undisturbed] == [[4, 8]] * 3
    first, second, third = kept(tmp_path / "killed", kill=1)
    assert killed_at in first.values() and killed_at not in {*second.values(), *third.values()}
    saved = tmp_path / f"killed/val/perplexity/step={killed_at}.ckpt"
    _, second, third = kept(tmp_path / "killed", kill=2, resume=saved)  # again, in the repeated validation
    assert killed_at in second.values() and killed_at not in third.values()
    saved = tmp_path / f"killed/val/loss/step={killed_at}.ckpt"
    assert kept(tmp_path / "killed", kill=None, resume=saved) == undisturbed


def test_keepers_of_one_last_checkpoint_judge_no_validation_twice(tmp_path: Path) -> None:
    """Its path is in the states of both. Judged again, the best one would take the place of the second best."""
    scores = {1: 2.0, 2: 1.0, 3: 9.0, 4: 9.0}
    score = LambdaCallback(
        on_validation_epoch_end=lambda trainer, module: module.log("val/score", scores[trainer.global_step])
    )

    def kept(folder: Path, *callbacks: Callback, resume: Path | None = None) -> dict[str, int]:
        keepers = [
            ModelCheckpoint(
                folder,
                f"{name}-{{step}}",
                monitor=f"val/{name}",
                save_top_k=2,
                save_last=True,
                auto_insert_metric_name=False,
                enable_version_counter=False,
            )
            for name in ("loss", "score")
        ]
        fit(folder, score, *keepers, *callbacks, resume=resume, steps=4, val_check_interval=ACCUMULATE)
        return steps(folder)

    undisturbed = kept(tmp_path / "whole")
    assert {"score-1.ckpt", "score-2.ckpt"} < undisturbed.keys()
    crash = LambdaCallback(on_train_batch_start=lambda trainer, *_: 1 / (2 - trainer.global_step))
    with pytest.raises(ZeroDivisionError):
        kept(tmp_path / "killed", crash)
    assert kept(tmp_path / "killed", resume=tmp_path / "killed/last.ckpt") == undisturbed


@pytest.mark.parametrize("names", [("val/loss", "val/perplexity"), ("val/loss",)], ids=["another order", "alone"])
def test_a_keeper_that_a_kill_left_out_is_found_among_others(names: tuple[str, ...], tmp_path: Path) -> None:
    def kept(folder: Path, *monitors: str, kill: bool = False, resume: Path | None = None) -> dict[str, int]:
        keepers = {name: ModelCheckpoint(folder / name, "{step}", monitor=name, save_top_k=-1) for name in monitors}
        if kill:
            keepers["val/loss"]._save_checkpoint = lambda *_: 1 / 0  # type: ignore[method-assign,return-value]
        fit(folder, *keepers.values(), resume=resume)
        return steps(folder / "val/loss")

    undisturbed = kept(tmp_path / "whole", "val/perplexity", "val/loss")
    with pytest.raises(ZeroDivisionError):
        kept(tmp_path / "killed", "val/perplexity", "val/loss", kill=True)
    assert not (tmp_path / "killed/val/loss").exists()
    assert kept(tmp_path / "killed", *names, resume=tmp_path / "killed/val/perplexity/step=4.ckpt") == undisturbed


@pytest.mark.parametrize(
    ("best_first", "micro_batches", "killed_at"),
    [(False, 1, 2), (True, 3, 2), (True, 1, 4), (False, 3, 4), (False, 1, 8), (True, 3, 8)],
)
def test_keepers_that_a_kill_left_out_save_the_step(
    best_first: bool, micro_batches: int, killed_at: int, tmp_path: Path
) -> None:
    """Killed when the first of three had saved, and again when the second had; also before a validation and at the end."""

    def kept(folder: Path, kill: int | None, resume: Path | None = None) -> list[dict[str, int]]:
        by_step = [
            ModelCheckpoint(folder / name, "{step}", monitor=monitor, every_n_train_steps=every, save_top_k=-1)
            for name, monitor, every in (("1", None, 1), ("2", None, 2), ("best", "train/loss", 1))
        ]
        by_step[1].filename, by_step[1].auto_insert_metric_name = "step={step} {train/grad_norm:.6f}", False
        best = ModelCheckpoint(
            folder / "val", "{step}", monitor="val/loss", save_top_k=-1, enable_version_counter=False
        )

        def killed(trainer: Trainer, path: str) -> None:
            if trainer.global_step == killed_at:
                raise KeyError(path)
            ModelCheckpoint._save_checkpoint(by_step[kill or 0], trainer, path)

        def run() -> None:
            keepers = [best, *by_step] if best_first else [*by_step, best]
            fit(
                folder,
                *keepers,
                resume=resume,
                accumulate_grad_batches=micro_batches,
                val_check_interval=4 * micro_batches,
            )

        if kill is not None:
            by_step[kill]._save_checkpoint = killed  # type: ignore[method-assign]
            with pytest.raises(KeyError):
                run()
        else:
            run()
        return [steps(Path(str(one.dirpath))) for one in (*by_step, best)]

    undisturbed = kept(tmp_path / "whole", kill=None)
    assert [len(found) for found in undisturbed] == [8, 4, 8, 2]
    first, second, third, _ = kept(tmp_path / "killed", kill=1)
    assert killed_at in first.values() and killed_at not in {*second.values(), *third.values()}
    saved = tmp_path / f"killed/1/step={killed_at}.ckpt"
    _, second, third, validated = kept(tmp_path / "killed", kill=2, resume=saved)  # again, when the resumed run begins
    assert killed_at in second.values() and killed_at not in {*third.values(), *validated.values()}
    assert (
        kept(tmp_path / "killed", kill=None, resume=next(tmp_path.glob(f"killed/2/step={killed_at} *"))) == undisturbed
    )


def test_early_stopping_may_decide_in_the_validation_that_was_left(tmp_path: Path) -> None:
    def run(*callbacks: Callback, resume: Path | None = None) -> int:
        stopper = EarlyStopping("val/loss", min_delta=100, patience=1)
        every = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=4, save_top_k=-1)
        return fit(tmp_path, stopper, every, SaveAtEnd(), *callbacks, steps=40, resume=resume).global_step

    crash = LambdaCallback(on_validation_start=lambda trainer, _: 1 / (8 - trainer.global_step))
    with pytest.raises(ZeroDivisionError):
        run(crash)
    assert run(resume=tmp_path / "step=8.ckpt") == 8


def test_a_validation_outside_of_the_fit_is_none_of_it(tmp_path: Path) -> None:
    """Nor does the note of what a keeper has seen take the place of a hook that it was given."""
    saved: list[int] = []
    every = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=4, save_top_k=-1)
    save = every.on_train_batch_end

    def on_train_batch_end(trainer: Trainer, *rest: object) -> None:
        saved.append(trainer.global_step)
        save(trainer, *rest)  # type: ignore[arg-type]

    every.on_train_batch_end = on_train_batch_end  # type: ignore[method-assign,assignment]
    trainer = fit(tmp_path, every, steps=8)
    assert set(saved) == set(range(9)) and every.best_model_path
    trainer.save_checkpoint(tmp_path / "before.ckpt")
    alone = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    for one in (trainer, alone):
        one.validate(trainer.lightning_module, SyntheticData(), verbose=False)
    assert trainer.lightning_module.position.validated == 8


def test_nothing_is_saved_where_checkpoints_are_turned_off(tmp_path: Path) -> None:
    fit(tmp_path, SaveAtEnd(), steps=2)
    assert steps(tmp_path) == {}


def test_nothing_is_saved_where_a_few_batches_are_tried(tmp_path: Path) -> None:
    fit(tmp_path, ModelCheckpoint(tmp_path, "{step}"), SaveAtEnd(), fast_dev_run=4)
    assert steps(tmp_path) == {}


def test_a_run_that_early_stopping_has_ended_goes_on_with_more_patience_only(tmp_path: Path) -> None:
    def run(patience: int) -> int:
        """Validates every 4 steps, where the loss never falls by 100; the last step it came to."""
        keeper = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=4)
        stopper = EarlyStopping("val/loss", min_delta=100, patience=patience)
        resume = tmp_path if any(tmp_path.iterdir()) else None
        return fit(tmp_path, stopper, keeper, SaveAtEnd(), steps=40, resume=resume).global_step

    assert run(patience=1) == 8
    for _ in range(2):
        with pytest.warns(UserWarning, match="EarlyStopping, monitor=val/loss, ended it at step 8; to go on, raise"):
            assert run(patience=1) == 8
    assert run(patience=2) == 12


def test_a_resumed_run_writes_the_latest_validation_into_names(tmp_path: Path) -> None:
    def names(folder: Path, *callbacks: Callback, resume: Path | None = None) -> set[str]:
        keeper = {"every_n_train_steps": 2, "save_top_k": -1, "auto_insert_metric_name": False}
        named = ModelCheckpoint(folder / "named", "{step}-{val/loss:.3f}-{train/loss:.3f}", **keeper)
        every = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
        fit(folder, named, every, *callbacks, resume=resume)
        return {path.name for path in (folder / "named").iterdir()}

    undisturbed = names(tmp_path)
    assert len(undisturbed) == 4 and sum("-0.000-" in name for name in undisturbed) == 2  # before the first validation
    crash = LambdaCallback(on_train_batch_start=lambda trainer, *_: 1 / (5 - trainer.global_step))
    with pytest.raises(ZeroDivisionError):
        names(tmp_path / "killed", crash)
    assert names(tmp_path / "killed", resume=tmp_path / "killed/step=5.ckpt") == undisturbed


@pytest.mark.parametrize(("mode", "before"), [("max", 4), ("min", 4), ("min", -1)])
def test_a_lower_save_top_k_holds_from_then_on(mode: str, before: int, tmp_path: Path) -> None:
    def fit_with(top_k: int, steps: int, resume: Path | None = None) -> ModelCheckpoint:
        keeper = ModelCheckpoint(
            tmp_path / "best",
            "{step}",
            monitor="train/tokens",
            mode=mode,
            save_top_k=top_k,
            every_n_train_steps=1,
            enable_version_counter=False,
        )
        fit(tmp_path, keeper, ModelCheckpoint(tmp_path, "last"), SaveAtEnd(), steps=steps, resume=resume)
        return keeper

    fit_with(before, 4)
    with pytest.warns(UserWarning, match=r"2 checkpoints exceed save_top_k=2, and stay in .*/best: step=.*, step=.*"):
        keeper = fit_with(2, 8, tmp_path)
    best, surplus = ([7, 8], [1, 2]) if mode == "max" else ([1, 2], [3, 4])
    assert sorted(steps(tmp_path / "best").values()) == sorted(best + surplus)
    assert sorted(Path(path).name for path in keeper.best_k_models) == [f"step={step}.ckpt" for step in best]


def test_a_save_top_k_that_is_lowered_to_what_there_is_holds(tmp_path: Path) -> None:
    """Lightning names the worst, which a better one replaces, only once there are `save_top_k`."""
    for top_k, end in ((3, 2), (2, 4)):
        keeper = {"filename": "{step}", "monitor": "train/tokens", "mode": "max", "every_n_train_steps": 1}
        best = ModelCheckpoint(tmp_path, save_top_k=top_k, **keeper)  # type: ignore[arg-type]
        fit(tmp_path, best, steps=end, resume=tmp_path if end == 4 else None)
    assert steps(tmp_path) == {"step=3.ckpt": 3, "step=4.ckpt": 4}


def test_the_best_of_another_folder_are_none(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    for folder, top_k in (("a", 3), ("b", 1)):
        keeper = ModelCheckpoint(
            tmp_path / folder, "{step}", monitor="train/loss", save_top_k=top_k, every_n_train_steps=1
        )
        fit(
            tmp_path / folder, keeper, steps=4 if folder == "a" else 6, resume=tmp_path / "a" if folder == "b" else None
        )
    assert not [one for one in recwarn if "save_top_k" in str(one.message)]
    assert len(steps(tmp_path / "a")) == 3 and len(steps(tmp_path / "b")) == 1


@pytest.mark.parametrize("replaced", [False, True])
def test_a_best_checkpoint_that_is_gone_or_replaced_has_no_score(replaced: bool, tmp_path: Path) -> None:
    """Another branch has deleted it, or saved it again; of this branch the best is kept."""

    def keeper() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path / "best", "{step}", monitor="train/tokens", every_n_train_steps=1)

    saves = [SaveAt(step * ACCUMULATE, tmp_path / f"{step}.ckpt") for step in (2, 3)]
    fit(tmp_path, keeper(), *saves, steps=3)
    shutil.rmtree(tmp_path / "best/step=1.ckpt")
    if replaced:
        shutil.copytree(tmp_path / "3.ckpt", tmp_path / "best/step=1.ckpt")
    with pytest.warns(UserWarning, match=r"best/step=1.ckpt is gone, or was saved again"):
        fit(tmp_path, keeper(), steps=4, resume=tmp_path / "2.ckpt")
    assert steps(tmp_path / "best") == {"step=2.ckpt": 2}  # which the keeper had not seen yet


def test_a_resumed_run_that_keeps_all_goes_on_keeping_all(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    for end in (4, 6):
        keeper = ModelCheckpoint(tmp_path, "{step}", monitor="train/tokens", save_top_k=-1, every_n_train_steps=1)
        fit(tmp_path, keeper, steps=end, resume=tmp_path / "step=4.ckpt" if end == 6 else None)
    assert len(keeper.best_k_models) == 6 and not [one for one in recwarn if "save_top_k" in str(one.message)]


def test_a_validation_before_is_not_the_result_of_a_run_that_validates_no_more(tmp_path: Path) -> None:
    def result(end: int, resume: Path | None, *callbacks: Callback, **settings: Any) -> dict[str, Any]:
        named = {"filename": "{step}-{val/loss:.3f}", "every_n_train_steps": 2, "save_top_k": -1}
        keeper = ModelCheckpoint(tmp_path, **named, auto_insert_metric_name=False)  # type: ignore[arg-type]
        fit(tmp_path, keeper, RunSummary(), *callbacks, steps=end, resume=resume, **settings)
        found: dict[str, Any] = json.loads((tmp_path / "summary.json").read_text())
        return found

    (tmp_path / "kept").mkdir()
    last = tmp_path / "kept/last.ckpt"  # of step 6, after the validation of step 4
    whole = result(6, None, SaveAt(6 * ACCUMULATE, last), SaveAt(4 * ACCUMULATE, tmp_path / "kept/four.ckpt"))
    assert whole["val_loss"] > 0 and result(6, last, limit_val_batches=0) == whole  # no step and no validation
    assert result(4, tmp_path / "kept/four.ckpt", limit_val_batches=0)["steps"] == 4
    longer = result(8, last, limit_val_batches=0)
    assert (longer["steps"], longer["val_loss"]) == (8, None)


def test_a_run_with_a_timer_is_resumed_from_within_a_validation(tmp_path: Path) -> None:
    """Lightning's time of validations is below 0 within the second one."""

    class Saves(Callback):
        def on_validation_batch_start(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == 8:
                trainer.save_checkpoint(tmp_path / "within.ckpt")

    fit(tmp_path, Timer(timedelta(hours=1)), Saves(), steps=8)
    state = read_document(tmp_path / "within.ckpt")["callbacks"]["Timer"]["time_elapsed"]
    assert state["validate"] < 0 < state["train"]
    assert fit(tmp_path, Timer(timedelta(hours=1)), steps=10, resume=tmp_path / "within.ckpt").global_step == 10


def test_a_best_checkpoint_of_a_fixed_name_is_that_of_an_undisturbed_run(tmp_path: Path) -> None:
    """It was replaced after the checkpoint that is resumed."""

    def kept(folder: Path, *callbacks: Callback, resume: Path | None = None) -> dict[str, int]:
        best = ModelCheckpoint(folder / "best", "best", monitor="train/tokens", mode="max", every_n_train_steps=3)
        every = ModelCheckpoint(folder, "{step}", every_n_train_steps=4, save_top_k=-1)
        fit(folder, best, every, *callbacks, resume=resume)
        return steps(folder / "best")

    undisturbed = kept(tmp_path)
    crash = LambdaCallback(on_train_batch_start=lambda trainer, *_: 1 / (7 - trainer.global_step))
    with pytest.raises(ZeroDivisionError):
        kept(tmp_path / "killed", crash)
    assert steps(tmp_path / "killed/best") == undisturbed == {"best.ckpt": 6}
    with pytest.warns(UserWarning, match=r"best/best.ckpt is gone, or was saved again"):
        assert kept(tmp_path / "killed", resume=tmp_path / "killed/step=4.ckpt") == undisturbed
