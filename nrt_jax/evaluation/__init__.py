"""Measurements of a model on examples it was not trained on."""
