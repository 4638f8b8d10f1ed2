"""Zero-shot tasks through lm-eval: `nlgmoe evaluate`, and the callback that runs them while a model trains."""
