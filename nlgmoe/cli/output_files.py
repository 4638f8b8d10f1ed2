"""Files that commands write: whole or not at all, and where they could not go is said before the work, not after it."""

from __future__ import annotations

from pathlib import Path

from nlgmoe.cli.errors import UsageError
from nlgmoe.files import atomic_write


def check_output(output: str) -> None:
    """Check that a new file can have this name.

    Raises:
        UsageError: it is a file's or folder's, or in a folder that is not there.
    """
    path = Path(output)
    if path.is_dir():
        raise UsageError(f"output={output} is a folder; give the name of a file")
    if path.exists():
        raise UsageError(f"output={output} exists already; name another file, or delete it")
    require_folder(path)


def require_folder(output: Path) -> None:
    """Check that the folder of a file to write is there.

    Raises:
        UsageError: it is not.
    """
    if not output.absolute().parent.is_dir():
        raise UsageError(f"output={output}: there is no folder {output.absolute().parent}; make it first")


def write_whole(output: str, text: str) -> None:
    """Write a new file under another name, then give it its own; what has that name stays if anything goes wrong.

    Raises:
        ValueError: it cannot be written, or is there by now: another process had the same output.
    """
    try:
        with atomic_write(Path(output)) as temporary:
            temporary.write_text(text, encoding="utf-8")
            check_output(output)
    except OSError as error:
        raise ValueError(f"output={output} cannot be written ({error.strerror}); make room, or name another") from error
