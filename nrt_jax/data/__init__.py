"""Questions and reference answers: sources, prompt templates, tokenizer, and the batch pipeline."""
