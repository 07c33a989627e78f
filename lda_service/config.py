"""Settings as frozen dataclasses.

Knows the names and defaults of every setting. Does not know where they come from (`cli` reads flags and the
environment), nor what they are used for.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lda_service.errors import ConfigError
from lda_service.pairs import demo

if TYPE_CHECKING:
    from pathlib import Path

DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTIZE = ("none", "int8")
STATIC_STEPS = ("auto", "on", "off")
SPECULATION = ("off", "auto", "coupled")
SCOPES = ("generate", "score", "admin")
BACKENDS = ("native", "vllm")
LOG_FORMATS = ("text", "json")
LOG_LEVELS = ("debug", "info", "warning", "error")


@dataclass(frozen=True, slots=True)
class PairConfig:
    """Which two models, and how they are loaded.

    `dtype` "auto" takes the type of the checkpoint; `device` "auto" takes CUDA where there is one. `native` False keeps
    to torch's operators on a CPU; `quantize` "int8" rounds the weights of linear layers, output layers excepted.
    """

    model_after_id: str
    model_before_id: str
    device: str = "auto"
    dtype: str = "auto"
    allow_incompatible: bool = False
    native: bool = True
    quantize: str = "none"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"DTYPE is {self.dtype!r}; use one of {', '.join(DTYPES)}.")
        if self.quantize not in QUANTIZE:
            raise ConfigError(f"QUANTIZE is {self.quantize!r}; use one of {', '.join(QUANTIZE)}.")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Limits of the decoder. Token counts are positions of one sequence or slots of the KV cache.

    `page_tokens` 0 means: 16 on a CPU, 256 on CUDA, where the paged kernel wants that. `kv_cache_tokens` 0 means: as
    many as `max_running_sequences` rows of the default length need. With `reserve_pages` a sequence takes the slots of
    its longest course when it starts and is never preempted; without it, as it grows.
    `deterministic` promises the same tokens alone and in any company, bit for bit, and reserves pages too; without it,
    near ties may fall either way. `static_step` "auto" decodes in steps of fixed shape, by CUDA graphs and one step
    ahead of the host, on CUDA only; "on" does that on a CPU too, without graphs. Both only for pairs without an adapter
    whose models both run through this engine's cache; such steps reserve pages.
    `speculation` says whether steps of at most `speculation_max_rows` sequences may draft: "auto" keeps the law of the
    tokens, "coupled" keeps the tokens of every seed and accepts fewer drafts; both only where measured to pay, for the
    same pairs as static steps, and neither beside these nor with `deterministic`.
    """

    max_running_sequences: int = 64
    max_queued_requests: int = 256
    max_sequences_per_request: int = 1024
    max_new_tokens: int = 4096
    prefill_chunk_tokens: int = 256
    page_tokens: int = 0
    kv_cache_tokens: int = 0
    reserve_pages: bool = False
    deterministic: bool = False
    static_step: str = "auto"
    speculation: str = "off"
    speculation_max_rows: int = 4
    min_alpha: float = -100.0
    max_alpha: float = 100.0

    def __post_init__(self) -> None:
        if self.static_step not in STATIC_STEPS:
            raise ConfigError(f"static_step is {self.static_step!r}; use one of {', '.join(STATIC_STEPS)}.")
        if self.speculation not in SPECULATION:
            raise ConfigError(f"Speculation is {self.speculation!r}; use one of {', '.join(SPECULATION)}.")


@dataclass(frozen=True, slots=True)
class VllmConfig:
    """How the vLLM backend spreads over devices and machines. Only with `Config.backend` "vllm".

    Every machine of a group runs the same settings but `node_rank`; that of rank 0 serves, at `master_addr`. It listens
    on `master_port` and the port after it, for the other ranks. `arguments` are passed on to vLLM's `EngineArgs`.
    """

    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    nnodes: int = 1
    node_rank: int = 0
    master_addr: str = "127.0.0.1"
    master_port: int = 29500
    arguments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        world = self.tensor_parallel_size * self.pipeline_parallel_size
        if not 0 <= self.node_rank < self.nnodes:
            raise ConfigError(f"NODE_RANK is {self.node_rank}; with NNODES={self.nnodes} use 0 to {self.nnodes - 1}.")
        if world % self.nnodes:
            raise ConfigError(
                f"TENSOR_PARALLEL_SIZE times PIPELINE_PARALLEL_SIZE is {world}, which {self.nnodes} machines cannot "
                "share evenly; choose a multiple of NNODES."
            )


@dataclass(frozen=True, slots=True)
class AdmissionConfig:
    """Who may come in besides the limits of the engine. Counts are over all waiting requests; 0 means no limit."""

    max_queued_tokens: int = 8_000_000
    max_requests_per_caller: int = 0


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """Where the server listens, what it puts up with, and how it stops. `port` 0 picks a free one.

    A worker that gives no sign of life for `worker_timeout_s` is replaced: longer than any step may take.
    """

    host: str = "127.0.0.1"
    port: int = 50051
    drain_grace_s: float = 30.0
    max_buffered_tokens: int = 16384
    worker_timeout_s: float = 60.0
    has_reflection: bool = True
    has_admin: bool = True
    max_message_bytes: int = 4 << 20


@dataclass(frozen=True, slots=True)
class AccessConfig:
    """Who may call, and how a connection is secured; nothing set means anybody, in plain text.

    `jwt_key_file` is a public key in PEM or a JSON web key set. With `tls_client_ca` every caller must show a
    certificate of these authorities, with `tls_client_san` one that carries one of these DNS names or URIs.
    `health_port` answers health checks in plain text, and nothing else.
    """

    tokens_file: Path | None = None
    jwt_key_file: Path | None = None
    jwt_audience: str | None = None
    jwt_issuer: str | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    tls_client_san: tuple[str, ...] = ()
    health_port: int | None = None

    def __post_init__(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError("TLS_CERT and TLS_KEY go together; set both, or neither.")
        if self.tls_client_ca and not self.tls_cert:
            raise ConfigError("TLS_CLIENT_CA asks callers for certificates over TLS; set TLS_CERT and TLS_KEY too.")
        if self.tls_client_san and not self.tls_client_ca:
            raise ConfigError("TLS_CLIENT_SAN names certificates that nobody checks; set TLS_CLIENT_CA too.")
        if (self.jwt_audience or self.jwt_issuer) and not self.jwt_key_file:
            raise ConfigError("JWT_AUDIENCE and JWT_ISSUER are of no use without keys; set JWT_KEY_FILE too.")
        if self.jwt_key_file and not self.jwt_audience:
            raise ConfigError("Tokens for other services of an issuer would open this one; set JWT_AUDIENCE too.")

    @property
    def takes_tokens(self) -> bool:
        """Whether a caller must send a token."""
        return self.tokens_file is not None or self.jwt_key_file is not None

    @property
    def authenticates(self) -> bool:
        """Whether a caller must say who it is."""
        return self.takes_tokens or self.tls_client_ca is not None


@dataclass(frozen=True, slots=True)
class TelemetryConfig:
    """What the server tells of itself. `metrics_port` None serves no metrics, 0 picks a free port.

    `traces` None leaves it to the OTEL_ variables of the environment. `log_prompts` writes prompts into the log.
    """

    metrics_host: str = "127.0.0.1"
    metrics_port: int | None = None
    traces: bool | None = None
    log_format: str = "text"
    log_level: str = "info"
    log_prompts: bool = False

    def __post_init__(self) -> None:
        if self.log_format not in LOG_FORMATS:
            raise ConfigError(f"LOG_FORMAT is {self.log_format!r}; use one of {', '.join(LOG_FORMATS)}.")
        if self.log_level not in LOG_LEVELS:
            raise ConfigError(f"LOG_LEVEL is {self.log_level!r}; use one of {', '.join(LOG_LEVELS)}.")


@dataclass(frozen=True, slots=True)
class HttpConfig:
    """Where `lda-service gateway` listens for HTTP. `port` 0 picks a free one."""

    host: str = "127.0.0.1"
    port: int = 8000


@dataclass(frozen=True, slots=True)
class Config:
    """Everything the server needs to know. `backend` is "native" or "vllm"; `vllm` is only read with the latter."""

    pair: PairConfig
    engine: EngineConfig = field(default_factory=EngineConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    admission: AdmissionConfig = field(default_factory=AdmissionConfig)
    access: AccessConfig = field(default_factory=AccessConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    backend: str = "native"
    vllm: VllmConfig = field(default_factory=VllmConfig)

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise ConfigError(f"BACKEND is {self.backend!r}; use one of {', '.join(BACKENDS)}.")
        if self.backend == "native" and self.vllm != VllmConfig():
            raise ConfigError(
                "The native engine decodes on one device of one machine: TENSOR_PARALLEL_SIZE, PIPELINE_PARALLEL_SIZE, "
                "NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT and VLLM_ARGS are for --backend vllm; leave them out."
            )


def pair_ids(after: str | None, before: str | None) -> tuple[str, str]:
    """The two model ids, or the bundled pair when neither is given.

    Raises:
        ConfigError: only one of the two is given.
    """
    if after and before:
        return after, before
    if after or before:
        missing = "MODEL_BEFORE_ID" if after else "MODEL_AFTER_ID"
        raise ConfigError(f"Only one model is set; set {missing} too, or neither for the bundled pair.")
    return str(demo.AFTER_DIR), str(demo.BEFORE_DIR)
