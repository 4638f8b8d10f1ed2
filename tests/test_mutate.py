"""The mutation campaign: which faults it makes, and that it sees a test notice one."""

from pathlib import Path

import pytest

from benchmarks.mutate import Importers, Mutant, Tree, mutants

SOURCE = '''
def larger(a: int, b: int = 2) -> int:
    """Return the larger one, of 2."""
    if not a:
        raise ValueError(f"a={a + 1}: give 1")
    return max(a, b)

def unnoticed() -> bool:
    return True
'''
TEST = """
from nlgmoe.part import larger, unnoticed

def test_larger():
    assert larger(1, 3) == 3 and unnoticed() is not None
"""


def test_faults_are_made_in_code_and_not_in_types_or_messages() -> None:
    assert [mutant.change for mutant in mutants("part.py", SOURCE)] == [
        "- def larger(a: int, b: int=2) -> int:\n+ def larger(a: int, b: int=3) -> int:",
        "- def larger(a: int, b: int=2) -> int:\n+ def larger(a: int, b: int=1) -> int:",
        "- if not a:\n+ if a:",
        "- raise ValueError(f'a={a + 1}: give 1')\n+ pass",
        "- return max(a, b)\n+ return None",
        "- return max(a, b)\n+ return min(a, b)",
        "- return True\n+ return None",
        "- return True\n+ return False",
    ]


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    root, folder = tmp_path / "root", tmp_path / "copy"
    files = {
        "nlgmoe/part.py": SOURCE,
        "nlgmoe/user.py": "import nlgmoe.part",
        "tests/test_part.py": TEST,
        "tests/test_user.py": "import nlgmoe.user",
        "tests/test_other.py": "import os",
    }
    for file, text in files.items():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(text)
    return Tree(root, files, folder, {})


def test_a_fault_that_a_test_notices_is_killed_and_another_survives(tree: Tree) -> None:
    assert Importers(tree.root).of("nlgmoe/part.py") == {"tests/test_part.py": 1, "tests/test_user.py": 2}
    killed, survives = (
        Mutant("nlgmoe/part.py", 1, SOURCE.replace(*change), "")
        for change in (("max(a, b)", "min(a, b)"), ("return True", "return False"))
    )
    assert tree.killer(killed, 60) == "tests/test_part.py::test_larger"
    assert tree.killer(survives, 60) is None
    assert (tree.folder / "nlgmoe/part.py").read_text() == SOURCE and tree.seconds.keys() == {
        "tests/test_part.py",
        "tests/test_user.py",
    }
