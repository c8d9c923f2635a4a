"""Decoders: architecture, weights, sharding and Hugging Face files."""
