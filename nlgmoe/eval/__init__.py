"""Evaluation of a model: loss and bits per byte by domain, expert specialisation, text generation."""
