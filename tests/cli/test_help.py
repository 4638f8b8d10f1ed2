"""`--help` explains every setting that is ours, in a sentence, and says what a number counts."""

import dataclasses
import re
import typing

import pytest
from jsonargparse import ArgumentParser

import nlgmoe.callbacks
from nlgmoe import MoEGPTModule, PileDataModule
from nlgmoe.cli.type_hints import item_of, members
from nlgmoe.commands.main import COMMANDS, function_of, main
from nlgmoe.data import Blend, MegatronIndexed, PocketPile

# What a number of ours counts, or the quantity that it is.
COUNTED = "tokens?|ids|blocks|heads|experts|assignments|sequences|documents|processes|micro-batches|steps|minutes"
COUNTED += "|checkpoints|values|TFLOPs"
QUANTITY = "probability|standard deviation|variance|multiple|weight|learning rate|decay|denominator|seed|temperature"


def parts_of(hint: typing.Any) -> tuple[typing.Any, ...]:
    return (*members(hint), *members(item_of(hint)))


def our_classes() -> list[type]:
    callbacks = [getattr(nlgmoe.callbacks, name) for name in nlgmoe.callbacks.__all__]
    found: list[type] = [MoEGPTModule, PileDataModule, Blend, MegatronIndexed, PocketPile, *callbacks]
    for kind in found:  # grows: a dataclass may hold another one
        for hint in typing.get_type_hints(kind.__init__).values():
            found += [part for part in parts_of(hint) if dataclasses.is_dataclass(part) and part not in found]
    return found


def test_help_of_a_setting_says_what_its_number_is() -> None:
    kinds = our_classes()
    names = {kind.__name__ for kind in kinds}
    assert {"GPTConfig", "MoEConfig", "AdamWConfig", "LearningRateSchedule", "BlendPart", "SampleText"} <= names
    for kind in kinds:
        parser = ArgumentParser()
        parser.add_class_arguments(kind, "it", fail_untyped=False)
        for action in parser._actions:
            field, sentence = action.dest.removeprefix("it."), action.help or ""
            if field == action.dest or "." in field or not hasattr(action, "_typehint"):
                continue  # the parser's own, a setting of a section, or a section
            setting = f"{kind.__name__}.{field}: {sentence!r}"
            assert len(sentence.split()) >= 3 and sentence.endswith((".", ").")), setting
            if {int, float} & set(parts_of(action._typehint)):
                assert re.search(rf"\b({COUNTED}|{QUANTITY})\b", sentence), f"{setting} of what?"


def test_help_overview_names_every_subcommand(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    text = capsys.readouterr().out
    for name, (_, summary) in COMMANDS.items():
        assert function_of(name).__doc__ and f"  {name:<15} {summary}\n" in text
