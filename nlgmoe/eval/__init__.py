"""What a trained model is worth: perplexity by domain, and generated text."""
