"""`nlgmoe experts`: which experts a text uses, what for, and what happens without one.

`eval/trace.py` records, `eval/trace_analyses.py` counts, `eval/causes.py` measures removals; `study.py` makes tables of them,
and `page.py` a page.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from nlgmoe.cli.arguments import check_device, import_allowed


def experts(
    source: str,
    text: str | None = None,
    windows: int = 200,
    exact: list[str] | None = None,
    against: str | None = None,
    output: str | None = None,
    trace_only: bool = False,
    weights: bool = False,
    without: list[str] | None = None,
    removal: Literal["route_around", "contribution"] | None = None,
    tokenizer: str | None = None,
    data_dir: str = "data/pocket_pile",
    device: str = "cpu",
    allow_code: list[str] | None = None,
) -> None:
    """Record every token's experts, and write what each expert is used for and what the loss would be without it.

    The output folder gets routing.safetensors, the trace; experts.csv, a row for each expert; analyses.csv, coactivation.csv,
    vocabulary.csv; and experts.html, a page that works offline.

    Args:
        source: the folder of a run, whose newest valid checkpoint is read, or a checkpoint.
        text: file of plain text to read; default: the run's validation text.
        windows: sequences read, of at most 2,048 tokens, of each domain of the run's validation text, or of `text`.
        exact: experts whose removal is computed exactly too, one pass for each: LAYER:EXPERT,EXPERT such as 0:3,7 (MoE layers and
            experts are counted from 0), LAYER:all, or all; may be given several times.
        against: an earlier checkpoint of the same run: adds saturation, the share of choices that it has in common.
        output: folder; default: experts in the run folder, or NAME-experts beside the checkpoint NAME.ckpt; its name ends with
            that of `text`.
        trace_only: write the trace alone; no backward pass.
        weights: store the experts' weights in the trace too.
        without: experts to remove from the model before, as for --exact; may be given several times.
        removal: route_around: other experts take the tokens, as in a pruned model; contribution: the output is 0. Default:
            route_around for `without`, both for `exact`.
        tokenizer: as data.tokenizer, for a checkpoint without a tokenizer.
        data_dir: folder of tokenizers given by name.
        device: device of the model, such as cuda.
        allow_code: module of the checkpoint's router, expert or attention to import; may be given several times.
    """
    import_allowed(allow_code)
    check_device(device)
    from nlgmoe.checkpoint.reading import run_config
    from nlgmoe.eval.interventions import parse_experts
    from nlgmoe.eval.loaded_model import load_pretrained
    from nlgmoe.tools.experts import page, study
    from nlgmoe.tools.measured_text import measured_text

    kind = removal or "route_around"
    loaded = load_pretrained(source, tokenizer, device, data_dir=data_dir, without=without or (), removal=kind)
    chosen = parse_experts(exact or [], loaded.model.config, "exact")
    folder = Path(output) if output is not None else _default_folder(Path(source), loaded.path, text)
    measured = measured_text(run_config(Path(source)), loaded, text, windows, tokenizer)
    if trace_only:
        trace = study.record(loaded, measured, folder / study.TRACE, weights)
        print(f"{trace.path}: {trace.num_tokens:,} tokens")
        return
    earlier = None if against is None else load_pretrained(against, tokenizer, device, data_dir=data_dir)
    removals = study.REMOVALS if removal is None else (removal,)
    found = study.study_experts(loaded, measured, folder, chosen, earlier, weights, removals)
    for name, table in found.tables.items():
        table.to_csv(folder / f"{name}.csv", index=False)
    file = page.write(folder, found)
    print(study.describe(found))
    print(f"page: {file} ({file.stat().st_size / 1e6:.1f} MB), tables and trace in {folder}")


def _default_folder(source: Path, checkpoint: Path, text: str | None) -> Path:
    name = "experts" if text is None else f"experts-{Path(text).stem}"
    return checkpoint.with_name(f"{checkpoint.stem}-{name}") if source.suffix == ".ckpt" else source / name
