import json

from tests.faults.results import DOCUMENT, FILE, with_tables


def test_the_tables_are_those_of_the_results() -> None:
    text = DOCUMENT.read_text()
    assert with_tables(text, json.loads(FILE.read_text())) == text
