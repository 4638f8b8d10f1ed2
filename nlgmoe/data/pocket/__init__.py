"""Builder of the pocket Pile, imported on first use only.

Reading order: `packages.py` (downloads), `extraction.py` (text), `deduplication.py`, `build.py`, `tokenizers.py`.
"""
