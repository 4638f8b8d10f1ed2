"""Text that is tokenised while training on it.

Reading order: `streamed_text.py` (the corpus), `data_files.py`, `eval_cache.py`, `logical_stream.py` (documents to windows),
`streamed_source.py` (windows to samples), `cursors.py` (positions that a checkpoint keeps).
"""
