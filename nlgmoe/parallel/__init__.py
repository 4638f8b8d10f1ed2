"""Experts and optimizer states spread over ranks. Training imports DeepSpeed here alone, and only when it is used."""
