"""Tasks to evaluate, with documents from the Hugging Face hub or from local files."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import huggingface_hub
from lightning.pytorch.utilities import rank_zero_warn

from nlgmoe.files import sha256_of
from nlgmoe.tools.lm_eval.lm_eval_model import BUILT_IN, TaskManager, load_yaml
from nlgmoe.tools.lm_eval.lockstep import describe
from nlgmoe.validation import SettingError, require

FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}
HUB_TIMEOUT = 5.0  # seconds
SEED = 1234  # of the choice of examples; lm-eval's
_IMPORTS = "install or write what it imports, or leave the task out"
_NAME = re.compile(r"^task:[ \t]*['\"]?([^\s'\"#]+)", re.MULTILINE)


class Tasks:
    """lm-eval's tasks, by name.

    Args:
        names: lm-eval's tasks, groups or tags, or paths of YAML files.
        data_dir: folder with documents in NAME.jsonl (or .json, .parquet, .csv, .arrow), which replace those of the hub;
            `nlgmoe prepare-eval` writes such a folder.
        include_path: folder of further tasks in lm-eval's YAML; a task with the name of a built-in one replaces it.
        num_fewshot: examples before each document; None: the task's setting, mostly 0.
    """

    def __init__(
        self,
        names: Sequence[str],
        data_dir: str | Path | None = None,
        include_path: str | Path | None = None,
        num_fewshot: int | None = None,
    ) -> None:
        if not names:
            raise SettingError("tasks= names no task; name at least one, such as lambada_openai")
        if num_fewshot is not None and num_fewshot < 0:
            raise SettingError(f"num_fewshot={num_fewshot} must be at least 0")
        for setting, folder in (("data_dir", data_dir), ("include_path", include_path)):
            if folder is not None and not Path(folder).is_dir():
                raise SettingError(f"{setting}={folder} is not a folder")
        self.names, self.num_fewshot = list(dict.fromkeys(names)), num_fewshot
        called = [
            found[1]
            if Path(name).is_file() and (found := _NAME.search(Path(name).read_text(errors="replace")))
            else name
            for name in self.names
        ]
        if again := [name for name in called if called.count(name) > 1]:
            raise SettingError(
                f"tasks: two have the name {again[0]}, and one result would be left; rename it in its file"
            )
        self._called = dict(zip(self.names, called, strict=True))
        self._data_dir = None if data_dir is None else Path(data_dir)
        for name, task in self._called.items():
            given = (
                [] if data_dir is None or name == task else [Path(data_dir, f"{task}{suffix}") for suffix in FORMATS]
            )
            if ignored := [file.name for file in given if file.exists()]:
                raise SettingError(
                    f"data_dir={data_dir}: {ignored[0]} cannot be the documents of {name}, which names its own; give "
                    f"the task as {task}, with include_path={Path(name).parent}"
                )
        self._manager = _manager(self.names, include_path)
        self._files = {} if data_dir is None else _read_from_files(self._manager.task_index, Path(data_dir))
        self._loaded: dict[str, dict[str, Any]] = {}
        for name in self.names:
            if name not in self._manager.task_index and not Path(name).is_file():
                close = difflib.get_close_matches(name, {*self._manager.task_index, *_built_in()}, n=1)
                raise SettingError(
                    f"tasks={name}: lm-eval has no such task{f'; did you mean {close[0]}?' if close else ''}"
                    f"{'' if include_path is not None else '; tasks of your own need include_path'}"
                )

    def load(self, name: str) -> dict[str, Any]:
        """Load a task, or the tasks of a group or tag, as lm-eval's `evaluate` takes them. Documents are read once."""
        if name not in self._loaded:
            self._loaded[name] = self._load(name)
        loaded = self._loaded[name]
        for task in loaded["tasks"].values():
            task.set_fewshot_seed(seed=SEED)
        return loaded

    def _load(self, name: str) -> dict[str, Any]:
        entry = self._manager.task_index.get(name)
        settings = (entry.cfg if entry is not None else None) or {}
        file, source = self._files.get(name), settings.get("dataset_path")
        group = entry is not None and entry.kind.name in ("GROUP", "TAG")
        if not isinstance(shots := settings.get("num_fewshot"), int | None):
            raise SettingError(f"task {name}: num_fewshot={shots!r} of its YAML is no whole number; correct it")
        if file is not None and group:
            raise SettingError(
                f"task {name}: it is a group, {file} cannot be its documents; name files after its tasks"
            )
        if file is not None and not (file.is_file() and file.stat().st_size):
            raise SettingError(f"task {name}: there are no documents in {file}; put them into it, or delete it")
        if file is not None and FORMATS[file.suffix] == "json":
            with file.open("rb") as opened:  # `datasets` dies of null
                if opened.read(1 << 16).lstrip(b"\xef\xbb\xbf \t\r\n")[:4] == b"null":
                    raise SettingError(f"task {name}: {file} begins with null, which is no document; remove it")
        local = source in set(FORMATS.values()) or bool(source and Path(source).exists())
        path = entry.yaml_path if entry is not None else Path(name)
        try:
            if path is not None:
                load_yaml(path)  # imports the functions that it names
        except Exception as error:
            raise SettingError(f"task {name}: {path} cannot be used ({describe(error)}); {_IMPORTS}") from error
        try:
            with _quiet(), nullcontext() if local else _hub():
                loaded = dict(self._manager.load([name]))
        except ImportError as error:
            raise SettingError(f"task {name}: lm-eval cannot load it ({describe(error)}); {_IMPORTS}") from error
        except Exception as error:
            if local:
                where = file or "the files that its YAML names"
                raise SettingError(f"task {name}: {where} cannot be read: {describe(error)}") from error
            raise SettingError(
                f"task {name}: "
                f"{_without_documents('TASK' if group else self._called[name], source, self._data_dir, error)}"
            ) from error
        for each, task in loaded["tasks"].items():
            given = task.get_config("num_fewshot")
            if self.num_fewshot is not None and given != 0:
                task.set_config(key="num_fewshot", value=self.num_fewshot)
            elif given is None:
                task.set_config(key="num_fewshot", value=0)
            elif self.num_fewshot:  # as in lm-eval's own command
                rank_zero_warn(
                    f"num_fewshot={self.num_fewshot} does not count for task {each}: its YAML sets 0 examples"
                )
            if wanted := task.get_config("num_fewshot"):
                _prepare_examples(each, task, wanted)
        return loaded


def _prepare_examples(name: str, task: Any, wanted: int) -> None:
    """Make no document an example for itself, and check that lm-eval can write the examples of the first one.

    lm-eval draws them without the document that is evaluated only where `fewshot_split` is the `test_split`, not where it
    takes them from that split for want of another, or from a `validation_split` that is evaluated.
    """
    drawn, splits = getattr(task, "fewshot_cfg", None), task.config
    itself = False
    if drawn is not None and (drawn.split is not None or drawn.samples is None):
        sources = (drawn.split, splits.training_split, splits.validation_split, splits.test_split)
        itself = next(filter(None, sources), None) == (splits.test_split or splits.validation_split)
        if itself:
            drawn.split = splits.test_split  # compared with that split only: the documents have been read
    # lm-eval draws one more where it takes the document out, which it does by that comparison alone.
    itself |= drawn is not None and drawn.split == splits.test_split and drawn.sampler != "first_n"
    there = max(len(task.sampler.df) - itself, 0) if hasattr(task, "sampler") else 0
    require(wanted <= there, f"num_fewshot={wanted}: task {name} has documents for {there} examples; lower it")
    task.set_fewshot_seed(seed=SEED)
    try:
        task.fewshot_context(task.eval_docs[0], wanted)
    except Exception as error:
        raise SettingError(
            f"num_fewshot={wanted}: lm-eval cannot write examples for task {name} ({describe(error)}); set 0"
        ) from error


def _read_from_files(index: dict[str, Any], folder: Path) -> dict[str, Path]:
    """Let the tasks of an index read the documents in `folder`, whether chosen by name, group or tag; the file of each."""
    files: dict[str, Path] = {}
    for file in (one for suffix in FORMATS for one in folder.glob(f"*{suffix}") if one.stem in index):
        if (other := files.setdefault(file.stem, file)) != file:
            raise SettingError(f"data_dir={folder}: {other.name} and {file.name} are of one task; remove one of them")
    for name, file in files.items():
        if index[name].kind.name == "TASK" and file.is_file():
            try:
                settings = load_yaml(index[name].yaml_path)
            except Exception:  # `Tasks.load` says why, if the task is evaluated
                continue
            index[name] = replace(index[name], yaml_path=None, cfg=settings | _documents_in(file, settings))
    return files


def _documents_in(file: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that make a task read its evaluation documents from `file`, and no other split."""
    split = settings.get("test_split") or settings.get("validation_split") or "test"
    splits = {f"{name}_split": None for name in ("training", "validation", "test", "fewshot")}
    evaluated = "test_split" if settings.get("test_split") else "validation_split"
    return {
        "dataset_path": FORMATS[file.suffix],
        "dataset_name": sha256_of(file),  # `datasets` keeps what it has read by this name, and by the file's time
        "dataset_kwargs": {"data_files": {split: str(file.resolve())}},
        **splits,
        evaluated: split,
    }


def _without_documents(name: str, source: str | None, data_dir: Path | None, error: Exception) -> str:
    where = f"{data_dir}/{name}.jsonl" if data_dir is not None else f"DIR/{name}.jsonl, and set data_dir=DIR"
    return (
        f"its documents, {source or 'of lm-eval'}, cannot be had from the Hugging Face hub ({describe(error)[:200]}); "
        f"put them into {where} (`nlgmoe prepare-eval DIR` does so for some tasks), or try again where there is a network"
    )


@contextmanager
def _hub() -> Iterator[None]:
    """Use only cached files if the hub does not answer; `datasets` itself would retry for half a minute."""
    offline = huggingface_hub.constants.HF_HUB_OFFLINE or not _hub_answers()
    with (
        mock.patch.object(huggingface_hub.constants, "HF_HUB_OFFLINE", offline),
        mock.patch.object(datasets.config, "HF_HUB_OFFLINE", offline),
    ):
        yield


def _hub_answers() -> bool:
    """Return True if the hub can be reached, whatever it answers."""
    try:
        huggingface_hub.utils.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=HUB_TIMEOUT)
    except Exception:  # the type depends on the HTTP library of the hub's client
        return False
    return True


@contextmanager
def _quiet() -> Iterator[None]:
    """Disable the progress bars of `datasets`, one per split and file."""
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _manager(names: Sequence[str], include_path: str | Path | None) -> TaskManager:
    """Return a task index that contains `names`; indexing all 14,000 built-in tasks takes lm-eval about 20 seconds."""
    own = [] if include_path is None else [Path(include_path)]
    manager = TaskManager(include_path=list(own), include_defaults=False)
    missing = [name for name in names if name not in manager.task_index and not Path(name).is_file()]
    if missing:
        others = [name for name in missing if name not in _built_in()]
        folders = {_built_in()[name].parent for name in missing if name in _built_in()}
        # A group, a tag, or a name that a YAML file composes needs the full index.
        full = any(name in text for name in others for text in _yaml_texts().values())
        manager = TaskManager(include_path=[*([] if full else sorted(folders)), *own], include_defaults=full)
    return manager


@lru_cache(maxsize=1)
def _yaml_texts() -> dict[Path, str]:
    """Read lm-eval's built-in YAML files."""
    return {path: path.read_text(encoding="utf-8", errors="replace") for path in sorted(BUILT_IN.rglob("*.yaml"))}


@lru_cache(maxsize=1)
def _built_in() -> dict[str, Path]:
    """Map each built-in task with a literal `task: NAME` to its file; the first file wins, as in lm-eval."""
    files: dict[str, Path] = {}
    for path, text in _yaml_texts().items():
        for name in _NAME.findall(text):
            files.setdefault(name, path)
    return files
