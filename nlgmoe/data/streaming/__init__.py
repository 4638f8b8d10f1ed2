"""Text that is tokenised while training on it.

Reading order: `streamed_text.py` (the corpus), `prepared_files.py` (its files, and the text for evaluation), `streams.py`
(documents to windows to samples, and the positions that a checkpoint keeps).
"""
