"""The pocket Pile, from packages to tokens.

Reading order: `packages.py` (what is downloaded), `extraction.py` (text out of it), `deduplication.py`, `pocket_pile.py` (what is
kept), `shards.py` (tokenised), `prepare.py` (these steps in a row).
"""
