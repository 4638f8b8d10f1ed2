"""Megatron-DeepSpeed's launch scripts, read without running them, and what their flags are called here."""
