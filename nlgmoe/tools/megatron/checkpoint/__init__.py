"""Import Megatron-DeepSpeed's checkpoints: `docs/megatron_checkpoints.md` has their layout and its sources."""
