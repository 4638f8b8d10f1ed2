"""Words that a configuration file gives in place of the command line."""

from pathlib import Path

import pytest

from nlgmoe.commands.main import main

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize(("names", "copied"), [("dense/laptop.yaml", 1), ("[dense/laptop.yaml]", 1), ("null", 0)])
def test_words_that_may_be_left_out_are_those_of_the_file(names: str, copied: int, tmp_path: Path) -> None:
    (tmp_path / "copy.yaml").write_text(f"names: {names}\noutput: {tmp_path / 'configs'}\n")
    main(["configs", "--config", str(tmp_path / "copy.yaml"), "copy"])
    assert len(list((tmp_path / "configs").rglob("*.yaml"))) == (copied or len(list(CONFIGS.rglob("*.yaml"))))


def test_one_word_of_a_file_is_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "report.yaml").write_text(f"runs: {tmp_path / 'nowhere'}\n")
    with pytest.raises(SystemExit) as end:
        main(["report", "--config", str(tmp_path / "report.yaml")])
    assert end.value.code == 2
    assert f"error: {tmp_path / 'nowhere'} does not exist" in capsys.readouterr().err
