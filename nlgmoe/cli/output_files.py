"""Files that commands write: whole or not at all, and where they could not go is said before the work, not after it."""

from __future__ import annotations

from pathlib import Path

from nlgmoe.cli.errors import UsageError
from nlgmoe.files import atomic_write


def check_output(output: str, source: str | None = None) -> None:
    """Check that a file can have this name.

    Args:
        output: the name.
        source: a file that is read for it; None: there is none.

    Raises:
        UsageError: it is a folder's, in one that is not there, or that of `source`.
    """
    path = Path(output).absolute()
    if source is not None and path.exists() and Path(source).exists() and path.samefile(source):
        raise UsageError(f"output={output} is the file that is read, and would be lost; name another")
    if path.is_dir():
        raise UsageError(f"output={output} is a folder; give the name of a file")
    if not path.parent.is_dir():
        raise UsageError(f"output={output}: there is no folder {path.parent}; make it first")


def write_whole(output: str, text: str) -> None:
    """Write a file under another name, then give it its own; what has that name stays if anything goes wrong.

    Raises:
        ValueError: it cannot be written.
    """
    try:
        with atomic_write(Path(output)) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"output={output} cannot be written ({error.strerror}); make room, or name another") from error
