"""Description of a corpus that checkpoints keep, so that resuming names a change of the data."""

from __future__ import annotations

from collections.abc import Mapping

Description = dict[str, dict[str, str | int]]
"""Domain, part of a blend or file -> fact -> value. The fact `text` is a hash of what the others leave open."""

SHOWN = 3


def description_of(corpus: object) -> Description:
    """Return the description of an open corpus; empty for a user's own class that has none."""
    found: Description = getattr(corpus, "description", {})
    return found


def differing(
    there: Mapping[str, object], here: Mapping[str, object], corpus_there: Description, corpus_here: Description
) -> list[str]:
    """Return what differs between two fingerprints of data, in words for each of the present one's entries.

    Args:
        there: saved fingerprint.
        here: present fingerprint.
        corpus_there: saved description of the corpus; empty: a corpus of a user's has none.
        corpus_here: present description.
    """
    changes = {key: f"{there.get(key)} there, {value} here" for key, value in here.items() if there.get(key) != value}
    if "corpus" in changes and corpus_there:
        changes["corpus"] = _describe_change(corpus_there, corpus_here) or changes["corpus"]
    return [f"{key} ({change})" for key, change in changes.items()]


def _describe_change(there: Description, here: Description) -> str:
    changes = [f"{name} is missing here" for name in there if name not in here]
    changes += [f"{name} is new here" for name in here if name not in there]
    for name in (name for name in there if name in here):
        old, new = there[name], here[name]
        facts = [fact for fact in old | new if old.get(fact) != new.get(fact)]
        shown = [
            f"{fact} {_number(old.get(fact))} there, {_number(new.get(fact))} here" for fact in facts if fact != "text"
        ]
        if facts:
            changes.append(f"{name} has {', '.join(shown) or 'other text'}")
    if not changes and list(there) != list(here):
        changes.append(f"the order is {', '.join(there)} there, {', '.join(here)} here")
    more = f"; and {len(changes) - SHOWN} more" if len(changes) > SHOWN else ""
    return "; ".join(changes[:SHOWN]) + more


def _number(value: str | int | None) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)
