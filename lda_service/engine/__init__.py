"""Decoding of a model pair. Knows torch and transformers; nothing of gRPC, processes or the wire."""
