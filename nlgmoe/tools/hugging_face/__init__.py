"""Export to and import from Hugging Face's format; an export includes the model's source files."""
