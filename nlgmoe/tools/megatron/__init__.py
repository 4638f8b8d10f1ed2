"""Megatron-DeepSpeed: its flags as our configurations."""
