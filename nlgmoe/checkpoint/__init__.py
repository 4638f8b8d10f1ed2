"""Checkpoints: the portable folder that training writes and everything else reads."""
