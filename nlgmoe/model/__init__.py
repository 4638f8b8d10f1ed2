"""The GPT: its layers in order, initial weights, compilation, and counts of parameters and FLOPs."""
