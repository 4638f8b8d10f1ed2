"""Evaluation of a model: loss and bits per byte by domain, the choices of experts, text generation."""
