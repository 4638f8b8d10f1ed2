"""What a corpus is made of, in a few words and counts that a checkpoint keeps: so that a change can be named on resuming."""

from __future__ import annotations

from collections.abc import Mapping

Description = dict[str, dict[str, str | int]]
"""Domain, part of a blend or file -> fact -> value. The fact `text` is a hash of what the others do not tell."""

SHOWN = 3


def description_of(corpus: object) -> Description:
    """The description of an open corpus; empty for a user's own class that has none."""
    found: Description = getattr(corpus, "description", {})
    return found


def differing(
    there: Mapping[str, object], here: Mapping[str, object], corpus_there: Description | None, corpus_here: Description
) -> list[str]:
    """What differs between two fingerprints of data, in words for each of the present one's entries; empty if nothing does.

    Args:
        there: fingerprint that was saved.
        here: the present one.
        corpus_there: description of the corpus that was saved with it; None: an earlier version saved none.
        corpus_here: the present one.
    """
    changes = {key: f"{there.get(key)} there, {value} here" for key, value in here.items() if there.get(key) != value}
    if "corpus" in changes and corpus_there is not None:
        changes["corpus"] = describe_change(corpus_there, corpus_here) or changes["corpus"]
    return [f"{key} ({change})" for key, change in changes.items()]


def describe_change(there: Description, here: Description) -> str:
    """What differs between the corpus of a checkpoint and the present one, on a line; empty if the descriptions are equal."""
    changes = [f"{name} is missing here" for name in there if name not in here]
    changes += [f"{name} is new here" for name in here if name not in there]
    for name in (name for name in there if name in here):
        old, new = there[name], here[name]
        facts = [fact for fact in old | new if old.get(fact) != new.get(fact)]
        if facts == ["text"]:
            same = " and ".join(fact for fact in new if fact != "text")
            changes.append(f"{name}: same {same}, other text")
        elif counts := [fact for fact in facts if fact != "text"]:
            changes.append(
                f"{name} has "
                + ", ".join(f"{fact} {_shown(old.get(fact))} there, {_shown(new.get(fact))} here" for fact in counts)
            )
    if not changes and list(there) != list(here):
        changes.append(f"the order is {', '.join(there)} there, {', '.join(here)} here")
    more = f"; and {len(changes) - SHOWN} more" if len(changes) > SHOWN else ""
    return "; ".join(changes[:SHOWN]) + more


def _shown(value: str | int | None) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)
