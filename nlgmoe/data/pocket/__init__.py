"""Builder of the pocket Pile's text.

Reading order: `packages.py` (downloads), `extraction.py` (text), `deduplication.py`, `build.py`.
"""
