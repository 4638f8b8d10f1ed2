"""Builder of the pocket Pile's text, and of the tokenizers that go by a name.

Reading order: `extraction.py` (text), `deduplication.py`, `build.py`, `tokenizers.py`.
"""
