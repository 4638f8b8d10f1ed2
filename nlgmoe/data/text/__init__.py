"""Documents from files: JSON lines, Parquet and plain text. Reading order: `records.py`, `bad_data.py`, `documents.py`."""
