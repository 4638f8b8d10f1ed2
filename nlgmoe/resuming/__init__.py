"""Resume a run: checks of its checkpoint, the position of Lightning's loops, and what callbacks had not seen."""
