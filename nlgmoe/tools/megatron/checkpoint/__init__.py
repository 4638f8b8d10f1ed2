"""Megatron-DeepSpeed's checkpoints, read and never run: `docs/megatron_checkpoints.md` has their layout with its sources."""
