"""Runs: the run folder, its checkpoints, signals, resuming, and refused options."""
