"""A headless Chromium, driven through its DevTools pipe: content, errors and network requests of a page."""

import json
import os
import select
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.support.programs import find

PATIENCE = 120  # seconds for an answer; the suite's processes share the cores


def chromium() -> str:
    """Return the path of Chromium; the environment variable CHROMIUM overrides it."""
    found = find("chromium")
    assert found, "no Chromium for the tests of reports: run `make browser`, or set CHROMIUM to where it is"
    return found


class Browser:
    """One tab of a Chromium of its own, without a network.

    Attributes:
        complaints: errors and warnings of the page, uncaught ones and those in its console.
        requests: addresses that the page asked for, beside its own.
    """

    def __init__(self, profile: Path, width: int = 1366, height: int = 900) -> None:
        self._profile, self._size = profile, (width, height)
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self._number, self._session, self._rest, self._loaded = 0, "", b"", False

    def __enter__(self) -> "Browser":
        (theirs_in, self._to), (self._from, theirs_out) = os.pipe(), os.pipe()
        flags = [
            "--headless",
            "--no-sandbox",  # containers have no user namespaces
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--no-proxy-server",
            "--host-resolver-rules=MAP * ~NOTFOUND",
            f"--user-data-dir={self._profile}",
            f"--window-size={self._size[0]},{self._size[1]}",
            "--remote-debugging-pipe",
        ]
        redirected = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'
        self._process = subprocess.Popen(
            ["bash", "-c", redirected, chromium(), *flags],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.terminate()
        self._process.wait(30)
        os.close(self._to)
        os.close(self._from)

    def open(self, file: Path) -> None:
        self._loaded, self._page = False, file.resolve().as_uri()
        self.ask("Page.navigate", url=self._page)
        while not self._loaded:
            self._hear()

    def evaluate(self, script: str) -> Any:
        answer = self.ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        os.write(
            self._to, json.dumps(message | ({"sessionId": self._session} if self._session else {})).encode() + b"\0"
        )
        while True:
            answer = self._hear()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer["error"]
                result: dict[str, Any] = answer["result"]
                return result

    def _hear(self) -> dict[str, Any]:
        """Receive the next message, and record events."""
        end = time.monotonic() + PATIENCE
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._from], [], [], max(0, end - time.monotonic()))
            heard = os.read(self._from, 1 << 16) if ready else b""
            assert heard, f"{chromium()} does not answer"
            self._rest += heard
        text, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        self._note(message.get("method"), message.get("params", {}))
        return message

    def _note(self, event: str | None, params: dict[str, Any]) -> None:
        if event == "Page.loadEventFired":
            self._loaded = True
        elif event == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(params["exceptionDetails"]))
        elif event == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.complaints.append(json.dumps(params["args"]))
        elif event == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.complaints.append(params["entry"]["text"])
        elif event == "Network.requestWillBeSent":
            url = params["request"]["url"]
            if url != self._page and not url.startswith(("data:", "about:")):
                self.requests.append(url)
