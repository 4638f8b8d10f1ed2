"""Description of a corpus that checkpoints keep, so that resuming names a change of the data."""

from __future__ import annotations

from collections.abc import Mapping

Description = dict[str, dict[str, str | int]]
"""Domain, part of a blend or file -> fact -> value. The fact `text` is a hash of the contents."""

SHOWN = 3


def description_of(corpus: object) -> Description:
    """Return the description of an open corpus; empty for a user's own class that has none."""
    description: Description = getattr(corpus, "description", {})
    return description


def differing(
    saved: Mapping[str, object], current: Mapping[str, object], saved_corpus: Description, current_corpus: Description
) -> list[str]:
    """Describe each entry of the current fingerprint of data that differs from the saved one.

    Args:
        saved: saved fingerprint.
        current: current fingerprint.
        saved_corpus: saved description of the corpus; empty: a user's own corpus has none.
        current_corpus: current description.
    """
    changes = {
        key: f"{saved.get(key)} there, {value} here" for key, value in current.items() if saved.get(key) != value
    }
    if "corpus" in changes and saved_corpus:
        changes["corpus"] = _describe_change(saved_corpus, current_corpus) or changes["corpus"]
    return [f"{key} ({change})" for key, change in changes.items()]


def _describe_change(saved: Description, current: Description) -> str:
    changes = [f"{name} is missing here" for name in saved if name not in current]
    changes += [f"{name} is new here" for name in current if name not in saved]
    for name in (name for name in saved if name in current):
        old, new = saved[name], current[name]
        facts = [fact for fact in old | new if old.get(fact) != new.get(fact)]
        described = [
            f"{fact} {_number(old.get(fact))} there, {_number(new.get(fact))} here" for fact in facts if fact != "text"
        ]
        if facts:
            changes.append(f"{name} has {', '.join(described) or 'other text'}")
    if not changes and list(saved) != list(current):
        changes.append(f"the order is {', '.join(saved)} there, {', '.join(current)} here")
    more = f"; and {len(changes) - SHOWN} more" if len(changes) > SHOWN else ""
    return "; ".join(changes[:SHOWN]) + more


def _number(value: str | int | None) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)
