"""Builder of the pocket Pile's text and of the tokenizers by name.

Reading order: `packages.py` (downloads), `extraction.py` (text), `deduplication.py`, `build.py`, `tokenizers.py`.
"""
