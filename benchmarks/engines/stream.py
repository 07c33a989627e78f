"""The whole service: `lda-service serve` in processes of its own, and this process as its gRPC client."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from typing import Any

from lda_client import AsyncLdaClient

from benchmarks import child
from benchmarks.workloads import ALPHA, TEMPERATURE


class Stream:
    """A server over a pair, ready; it ends with this process's interest in it."""

    def __init__(self, after: str, before: str, dtype: str) -> None:
        settings = {"MODEL_AFTER_ID": after, "MODEL_BEFORE_ID": before, "DTYPE": dtype, "DEVICE": "cpu"}
        self._server = subprocess.Popen(
            [sys.executable, "-m", "lda_service", "serve", "--port", "0"],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **settings},
        )
        self._target = self._line("listening on").split()[-1]
        self._line("ready")
        self._loop = asyncio.new_event_loop()
        self._client = self._loop.run_until_complete(self._connect())
        pair = self._loop.run_until_complete(self._client.model_pair())
        self.vocabulary = pair.after.vocab_size

    def versions(self) -> dict[str, str]:
        """See `child.Handler`."""
        return child.versions("lda-service", "grpcio", "torch", "transformers")

    def run(self, rows: int, prompt: int, new: int, top_p: float, seed: int, calls: int = 1) -> dict[str, Any]:
        """Decode the workload, its rows spread over `calls` calls at once: tokens as they arrived, and seconds."""
        ids = child.prompt_ids(prompt, self.vocabulary, seed)
        start = time.perf_counter()
        tokens = self._loop.run_until_complete(self._all(ids, rows, new, top_p, calls))
        return {"tokens": tokens, "rows": rows, "seconds": time.perf_counter() - start}

    def close(self) -> None:
        """Stop the server."""
        self._server.terminate()
        self._server.wait()

    async def _connect(self) -> AsyncLdaClient:
        return AsyncLdaClient(self._target)

    async def _all(self, ids: list[int], rows: int, new: int, top_p: float, calls: int) -> int:
        return sum(await asyncio.gather(*(self._one(ids, rows // calls, new, top_p, n) for n in range(calls))))

    async def _one(self, ids: list[int], rows: int, new: int, top_p: float, seed: int) -> int:
        tokens = 0
        stream = self._client.generate(
            ids,
            alpha=ALPHA,
            num_sequences=rows,
            temperature=TEMPERATURE,
            top_p=top_p,
            seed=seed,
            max_new_tokens=new,
            ignore_eos=True,
        )
        async with stream:
            async for event in stream:
                if event.HasField("delta"):
                    tokens += len(event.delta.tokens)
        return tokens

    def _line(self, beginning: str) -> str:
        """The server's next line that begins so."""
        assert self._server.stdout is not None
        for line in self._server.stdout:
            if line.startswith(beginning):
                return line
        raise RuntimeError("the server ended before it was ready; its log is above")


if __name__ == "__main__":
    child.serve(Stream)
