"""What a machine lacks skips the tests that need it, with a reason; in CI they run."""

from pathlib import Path

import pytest

from tests.tools import find, needs


def test_what_is_missing_skips_but_not_in_ci(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CXX", "CHROMIUM", "CI"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "google-chrome").touch(0o755)
    needs("chromium")
    with pytest.raises(pytest.skip.Exception, match=r"^needs c\+\+ and ninja, which this machine lacks$"):
        needs("c++", "chromium", "ninja")
    monkeypatch.setenv("CXX", "google-chrome")
    assert find("c++") == find("g++") == str(tmp_path / "google-chrome")
    monkeypatch.setenv("CI", "true")
    needs("ninja")
