"""A page in a headless Chromium without a network: what a script finds in it, and what goes wrong."""

import json
import re
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

from tests.support.programs import find

PATIENCE = 120  # seconds for a page; the suite's processes share the cores
FLAGS = (
    "--headless",
    "--no-sandbox",  # containers have no user namespaces
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--no-proxy-server",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--virtual-time-budget=10000",
    "--dump-dom",
)
# Collects errors, warnings in the console, and addresses of what the page asks for beside itself, which is blocked.
WATCH = """<head><meta http-equiv="Content-Security-Policy" content="default-src 'unsafe-inline' 'unsafe-eval' data: blob:">
<script>
const complaints = [];
addEventListener("error", event => complaints.push(event.message));
addEventListener("unhandledrejection", event => complaints.push(String(event.reason)));
addEventListener("securitypolicyviolation", event => complaints.push(event.blockedURI));
console.error = console.warn = (...words) => complaints.push(words.join(" "));
</script>"""
ASK = """<script>addEventListener("load", () => {
  let answer = null;
  try { answer = (() => { SCRIPT })(); } catch (error) { complaints.push(error.stack); }
  setTimeout(() => { document.body.dataset.answer = JSON.stringify({ answer, complaints }); }, 100);
});</script></body>"""


def look(page: Path, script: str, folder: Path, width: int = 1366) -> Any:
    """Return what the body of a function `script` returns in the loaded page, of which nothing is wrong.

    Args:
        folder: a folder of Chromium's own.
        width: of the window, at least 500 pixels, Chromium's least.
    """
    chromium = find("chromium")
    assert chromium, "no Chromium for the tests of reports: run `make browser`, or set CHROMIUM to where it is"
    text = page.read_text(encoding="utf-8").replace("<head>", WATCH, 1)
    before, _, after = text.rpartition("</body>")
    watched = folder / "watched.html"
    watched.write_text(before + ASK.replace("SCRIPT", script) + after, encoding="utf-8")
    own = (f"--user-data-dir={folder / 'profile'}", f"--window-size={width},900", watched.as_uri())
    done = subprocess.run(
        [chromium, *FLAGS, *own], capture_output=True, text=True, encoding="utf-8", timeout=PATIENCE, check=True
    )
    found = re.search(r'<body[^>]* data-answer="([^"]*)"', done.stdout)
    assert found, f"{chromium} does not answer: {done.stderr[-2000:]}"
    answer = json.loads(unescape(found[1]))
    assert answer["complaints"] == []
    return answer["answer"]
