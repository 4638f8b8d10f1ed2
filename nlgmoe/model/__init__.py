"""The model put together from the layers, and arithmetic about it."""
