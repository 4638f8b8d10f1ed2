"""The lists of Megatron's flags in the documents are the translator's."""

from benchmarks.flag_table import PAGE, with_table


def test_flag_table_of_the_docs_is_the_translators() -> None:
    page = PAGE.read_text()
    assert with_table(page) == page, "run `make docs`"
