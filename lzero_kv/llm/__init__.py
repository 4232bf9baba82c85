"""Language models under transformers."""
