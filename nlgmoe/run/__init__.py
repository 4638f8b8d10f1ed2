"""Runs: the run folder, its checkpoints, signals, resuming, and what a run refuses."""
