"""Documents from files: JSON lines and Parquet. Reading order: `records.py`, `bad_data.py`, `documents.py`."""
