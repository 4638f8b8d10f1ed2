"""Experts and optimizer states spread over ranks. The only part that imports DeepSpeed, and only when it is used."""
