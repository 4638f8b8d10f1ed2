"""A page as one HTML file, with style, data and scripts inside, so that it works offline."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from typing import Any


def html_page(title: str, package: str, body: str, facts: Any, scripts: Sequence[str] = ()) -> str:
    """Return a page with the style `page.css` and the script `page.js` of a package.

    Args:
        package: name of the package.
        body: HTML of the content.
        facts: data of the script, which finds it as JSON in the element `facts`.
        scripts: others, which come before.
    """
    style, own = (files(package).joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    elements = "\n".join(f"<script>{script}</script>" for script in (*scripts, own))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
<script id="facts" type="application/json">{json_in_script(facts)}</script>
{elements}
</body>
</html>
"""


def json_in_script(value: Any) -> str:
    """Return JSON for a script element, which `</script>` and `<!--` would end."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")
