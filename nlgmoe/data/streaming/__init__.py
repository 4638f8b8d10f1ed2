"""Text that is read while it is trained on.

Reading order: `streamed_text.py` (the corpus), `text_files.py` and `eval_cache.py` (what it is made of), `logical_stream.py`,
`streamed_source.py` (streams and the samples out of them), `cursors.py` (where training stands in them).
"""
