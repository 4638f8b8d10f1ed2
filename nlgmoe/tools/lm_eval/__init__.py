"""Zero-shot tasks with lm-eval: `nlgmoe evaluate`, and a callback for training."""
