"""Draw docs/report.png, two sections of a report, by Chromium: `python docs/report.py runs/quickstart/report.html`."""

import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageChops

SHOWN = ("load", "preference")  # ids of charts
WIDTH, HEIGHT = 1366, 4000  # of the window, in pixels; what is empty below is cut off

picture, page = Path(__file__).with_name("report.png"), Path(sys.argv[1]).read_text(encoding="utf-8")
charts = ", ".join(f"[id^={name}]" for name in SHOWN)
hidden = f"main > :not(section:has({charts})), article:not({charts}) {{ display: none !important }}"
with tempfile.TemporaryDirectory() as folder:
    shown = Path(folder, "report.html")
    shown.write_text(page.replace("</head>", f"<style>{hidden}</style></head>", 1), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--hide-scrollbars", "--virtual-time-budget=20000"]
    options += [f"--window-size={WIDTH},{HEIGHT}", f"--screenshot={picture}", f"--user-data-dir={folder}/profile"]
    subprocess.run(["chromium", *options, shown.as_uri()], check=True, capture_output=True)
image = Image.open(picture).convert("RGB")
empty = Image.new("RGB", image.size, image.getpixel((0, HEIGHT - 1)))
left, top, right, bottom = ImageChops.difference(image, empty).getbbox()
image.crop((0, max(0, top - 20), WIDTH, bottom + 20)).quantize(256).save(picture, optimize=True)
