"""The model-pair worker: its own process, owner of both models and both KV caches."""
