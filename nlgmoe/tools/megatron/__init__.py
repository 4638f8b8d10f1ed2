"""Megatron-DeepSpeed: its flags as our configurations, its checkpoints as ours."""
