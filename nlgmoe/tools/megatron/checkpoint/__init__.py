"""Import Megatron-DeepSpeed's checkpoints: `docs/results/megatron_layout.md` has their layout and its sources."""
