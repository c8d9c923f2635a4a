"""Serving: a trained run behind an OpenAI-compatible HTTP interface and JetStream's gRPC server."""
