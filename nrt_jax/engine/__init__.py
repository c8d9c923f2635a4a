"""Rollouts: prompts in, traces out, through a JetStream engine."""
