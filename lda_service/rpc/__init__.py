"""Everything that knows gRPC. Owns no torch state: the worker does."""
