"""`nlgmoe configs`: the configuration files that come with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import nlgmoe
from nlgmoe.cli.errors import did_you_mean
from nlgmoe.validation import SettingError

ROOT = Path(nlgmoe.__file__).parent / "configs"  # in the repository a link to the folder at the top


def configs(action: Literal["list", "copy"], names: tuple[str, ...] = (), output: str = "configs") -> None:
    """List the configuration files of the package, or copy them into a folder.

    Args:
        action: "list" prints the names with the first line of each; "copy" writes the files.
        names: files or folders, such as quickstart.yaml or pr_moe; default: all.
        output: folder to copy to; existing files are not overwritten.
    """
    shipped = sorted(path.relative_to(ROOT) for path in [*ROOT.glob("*.yaml"), *ROOT.glob("*/*.yaml")])
    known = [str(path) for path in [*shipped, *sorted({path.parent for path in shipped} - {Path()})]]
    for name in names:
        if str(Path(name)) not in known:
            remedy = did_you_mean(name, known) or "; see nlgmoe configs list"
            raise SettingError(f"names={name} is no file of the package{remedy}")
    wanted = [path for path in shipped if not names or {path, path.parent} & set(map(Path, names))]
    if action == "list":
        for path in wanted:
            print(f"{path!s:<32} {(ROOT / path).read_text().partition(chr(10))[0].lstrip('# ')}")
        return
    if existing := [path for path in wanted if (Path(output) / path).exists()]:
        first = Path(output) / existing[0]
        raise SettingError(f"output={output}: {first} exists already; name another folder, or delete it")
    for path in wanted:
        copy = Path(output) / path
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes((ROOT / path).read_bytes())
        print(copy)
