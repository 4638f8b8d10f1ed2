"""Mixture-of-Students: a smaller model that learns from a larger one (paper, section 4.2)."""
