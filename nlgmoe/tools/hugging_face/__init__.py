"""Folders of Hugging Face's format: written, with the model's own sources in them, and read."""
