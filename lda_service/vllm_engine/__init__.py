"""The pair on vLLM: for models that outgrow one device or one machine.

vLLM loads, shards, batches and caches; both models are one vLLM model, so there is one schedule and one KV cache
manager. What is drawn, reported and refused is this project's own, the same as on the native engine. Works with one
minor version of vLLM, which is checked at start-up.
"""

from __future__ import annotations

ARCHITECTURE = "AmplifiedPairForCausalLM"
VLLM_MINOR = "0.32"


def register() -> None:
    """Make the pair known to vLLM, which calls this in each of its processes, perhaps more than once."""
    from vllm import ModelRegistry

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, f"lda_service.vllm_engine.model:{ARCHITECTURE}")
