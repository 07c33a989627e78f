"""What is measured: pairs, workloads and engines, as plain data. Knows no torch; nothing here runs anything."""

from __future__ import annotations

from dataclasses import dataclass, replace

ALPHA = 1.0
TEMPERATURE = 0.8


@dataclass(frozen=True, slots=True)
class PairShape:
    """Two random models of one shape, made from a configuration and two seeds."""

    name: str
    architecture: str
    hidden: int
    layers: int
    heads: int
    intermediate: int
    vocabulary: int
    context: int = 2048

    @property
    def layer_parameters(self) -> int:
        """Weights of all layers' products: four attention projections and three of the gated feed-forward part."""
        return self.layers * (4 * self.hidden**2 + 3 * self.hidden * self.intermediate)

    @property
    def head_parameters(self) -> int:
        """Weights of the output layer."""
        return self.hidden * self.vocabulary

    def settings(self) -> dict[str, object]:
        """The same in transformers' words."""
        return {
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "intermediate_size": self.intermediate,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": self.context,
            "tie_word_embeddings": False,
        }


PAIRS = {
    shape.name: shape
    for shape in (
        PairShape("bench-190m", "llama", 768, 12, 12, 3072, 50_304),
        PairShape("bench-1b", "olmo2", 2048, 16, 16, 8192, 100_352),
    )
}
BUNDLED = "bundled"

ENGINES = {
    "ours": "this project's engine",
    "generate": "transformers generate() with a logits processor that runs the second model, batched",
    "loop": "one request at a time, two models, DynamicCache, top_p by sorting",
    "continuous": "transformers' continuous batching, one model at a time, pair-equivalent",
    "vllm": "vLLM, one model at a time, pair-equivalent",
}
SINGLE_MODEL = frozenset({"continuous", "vllm"})
ALL = tuple(ENGINES)


@dataclass(frozen=True, slots=True)
class Workload:
    """`rows` sequences of one prompt, `new` tokens each, end-of-sequence ignored."""

    name: str
    pair: str
    rows: int
    prompt: int
    new: int
    top_p: float = 1.0
    engines: tuple[str, ...] = ALL

    @property
    def tokens(self) -> int:
        """Tokens that every engine must deliver."""
        return self.rows * self.new

    @property
    def title(self) -> str:
        """For tables."""
        top_p = "" if self.top_p == 1 else f", top_p {self.top_p:g}"
        return f"{self.pair}: {self.rows} x (prompt {self.prompt}, {self.new} new){top_p}"

    def quick(self) -> Workload:
        """The same shape with few new tokens: to see that everything works, not to report."""
        return replace(self, new=min(self.new, 8))


ROW_COUNTS = (1, 2, 4, 8, 16, 32, 64)
# Without an attention that knows the shared prompt, these take minutes for each repetition.
LONG_PROMPT = ("ours", "loop", "vllm")
WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("one", "bench-190m", 1, 32, 64),
        Workload("rollouts-256", "bench-190m", 64, 256, 64),
        Workload("rollouts-256-top-p", "bench-190m", 64, 256, 64, top_p=0.95),
        Workload("rollouts-1024", "bench-190m", 64, 1024, 32, engines=LONG_PROMPT),
        *(Workload(f"rows-{n}", "bench-190m", n, 256, 32, engines=("ours", "vllm")) for n in ROW_COUNTS),
        Workload("1b-one", "bench-1b", 1, 32, 32, engines=LONG_PROMPT),
        Workload("1b-16", "bench-1b", 16, 256, 32, engines=LONG_PROMPT),
        Workload("bundled-one", BUNDLED, 1, 16, 64, engines=("ours", "loop")),
    )
}
STUDIES = {
    "memory": "KV bytes held by 64 rollouts of a 1024-token prompt, against one prompt plus 64 suffixes",
    "first-token": "steps to the first token of a new request, idle and while 32 rows decode",
    "stream": "the streamed service, gRPC included, against the bare engine at 64 rows",
}
