"""The command `lda-service`; with `cli_access`, the only place that reads the environment.

Turns flags, or the environment variables that are their twins, into a `Config`, and start-up errors into one sentence
on stderr and exit code 1. Everything heavy is imported inside the commands: the worker process imports this module too.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lda_service import __version__
from lda_service.cli_access import access_options, probe_options, token
from lda_service.cli_doctor import doctor
from lda_service.cli_vllm import vllm_options
from lda_service.config import (
    DTYPES,
    LOG_FORMATS,
    LOG_LEVELS,
    QUANTIZE,
    SPECULATION,
    AccessConfig,
    AdmissionConfig,
    Config,
    EngineConfig,
    HttpConfig,
    PairConfig,
    ServerConfig,
    TelemetryConfig,
    VllmConfig,
    pair_ids,
)
from lda_service.errors import ConfigError, LdaError
from lda_service.telemetry import configure_logging

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from lda_service.pair_info import PairInfo

BUNDLED_NOTICE = """
********************************************************************************
*  NO MODELS SET: SERVING THE BUNDLED DEMO PAIR, TWO TINY TOY MODELS.          *
*  Set MODEL_AFTER_ID and MODEL_BEFORE_ID to serve models of your own.         *
********************************************************************************"""

PROMPTS_NOTICE = """
********************************************************************************
*  PROMPTS ARE LOGGED: --log-prompts writes what callers ask into this log.    *
********************************************************************************"""

ENGINE, SERVER, ADMISSION = EngineConfig(), ServerConfig(), AdmissionConfig()
HTTP, TELEMETRY = HttpConfig(), TelemetryConfig()

log = logging.getLogger(__name__)


@click.group()
@click.version_option(__version__)
def main() -> None:
    """Logit diff amplification: two language models decoded in lock-step, served over gRPC."""


@main.command()
@click.option("--model-after-id", envvar="MODEL_AFTER_ID", help="Post-trained model: a hub id or a folder.")
@click.option("--model-before-id", envvar="MODEL_BEFORE_ID", help="Reference model: a hub id or a folder.")
@click.option("--device", envvar="DEVICE", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, ...")
@click.option("--dtype", envvar="DTYPE", default="auto", show_default=True, type=click.Choice(DTYPES))
@click.option(
    "--quantize",
    envvar="QUANTIZE",
    default="none",
    show_default=True,
    type=click.Choice(QUANTIZE),
    help="Round the weights of linear layers; the log says what error that brings.",
)
@click.option("--host", envvar="HOST", default=SERVER.host, show_default=True, help="Address to listen on.")
@click.option(
    "--port",
    envvar="PORT",
    default=SERVER.port,
    show_default=True,
    type=click.IntRange(0, 65535),
    help="0 picks a free one.",
)
@click.option(
    "--max-running-sequences",
    default=ENGINE.max_running_sequences,
    show_default=True,
    type=click.IntRange(min=1),
    help="Sequences decoded at once.",
)
@click.option(
    "--max-queued-requests",
    default=ENGINE.max_queued_requests,
    show_default=True,
    type=click.IntRange(min=1),
    help="Requests that may wait; more are refused.",
)
@click.option(
    "--max-new-tokens",
    envvar="MAX_NEW_TOKENS",
    default=ENGINE.max_new_tokens,
    show_default=True,
    type=click.IntRange(min=1),
    help="New tokens that one sequence may ask for.",
)
@click.option(
    "--max-sequences-per-request",
    envvar="MAX_SEQUENCES_PER_REQUEST",
    default=ENGINE.max_sequences_per_request,
    show_default=True,
    type=click.IntRange(1, 1024),
    help="Sequences that one request may ask for.",
)
@click.option(
    "--kv-cache-tokens",
    default=ENGINE.kv_cache_tokens,
    show_default=True,
    type=click.IntRange(min=0),
    help="Positions each model's cache holds; 0 means as many as the running sequences need.",
)
@click.option(
    "--deterministic",
    envvar="DETERMINISTIC",
    is_flag=True,
    help="The same tokens alone and in any company, bit for bit; refused where that cannot be kept.",
)
@click.option(
    "--native/--no-native",
    envvar="NATIVE",
    default=True,
    show_default=True,
    help="On a CPU: kernels of our own, built by the machine's C compiler, or torch's operators.",
)
@click.option(
    "--speculation",
    default=ENGINE.speculation,
    show_default=True,
    type=click.Choice(SPECULATION),
    help="Let the after model draft several tokens when few sequences run and it pays. auto: same law, other tokens "
    "for a seed, and these depend on timing; coupled: same tokens.",
)
@click.option("--allow-incompatible", is_flag=True, help="Serve a pair whose vocabularies differ, on its shared ids.")
@click.option(
    "--drain-grace",
    "drain_grace_s",
    envvar="DRAIN_GRACE",
    default=SERVER.drain_grace_s,
    show_default=True,
    type=click.FloatRange(min=0),
    help="Seconds that running streams get at shutdown.",
)
@click.option(
    "--worker-timeout",
    "worker_timeout_s",
    envvar="WORKER_TIMEOUT",
    default=SERVER.worker_timeout_s,
    show_default=True,
    type=click.FloatRange(min=0.1),
    help="Seconds without a sign of life after which the worker is replaced; no step may take as long.",
)
@click.option(
    "--max-queued-tokens",
    envvar="MAX_QUEUED_TOKENS",
    default=ADMISSION.max_queued_tokens,
    show_default=True,
    type=click.IntRange(min=0),
    help="Tokens that waiting requests may ask for together, prompts and new ones; 0 means any number.",
)
@click.option(
    "--max-requests-per-caller",
    envvar="MAX_REQUESTS_PER_CALLER",
    default=ADMISSION.max_requests_per_caller,
    show_default=True,
    type=click.IntRange(min=0),
    help="Requests that one caller (token, certificate or address) may have open; 0 means any number.",
)
@click.option(
    "--max-buffered-tokens",
    envvar="MAX_BUFFERED_TOKENS",
    default=SERVER.max_buffered_tokens,
    show_default=True,
    type=click.IntRange(min=1),
    help="Tokens that may wait for a slow reader before its stream is ended.",
)
@click.option(
    "--max-message-bytes",
    envvar="MAX_MESSAGE_BYTES",
    default=SERVER.max_message_bytes,
    show_default=True,
    type=click.IntRange(min=1024),
    help="Size of one message, in either direction.",
)
@click.option(
    "--reflection/--no-reflection",
    "has_reflection",
    envvar="REFLECTION",
    default=SERVER.has_reflection,
    show_default=True,
    help="Describe the services to callers that ask.",
)
@click.option(
    "--admin/--no-admin",
    "has_admin",
    envvar="ADMIN",
    default=SERVER.has_admin,
    show_default=True,
    help="Offer the methods of lda.v1.AdminService.",
)
@vllm_options
@access_options
@click.option(
    "--metrics-port",
    envvar="METRICS_PORT",
    type=click.IntRange(0, 65535),
    help="Serve Prometheus metrics over HTTP on this port; 0 picks a free one. Off unless given.",
)
@click.option(
    "--metrics-host",
    envvar="METRICS_HOST",
    default=TELEMETRY.metrics_host,
    show_default=True,
    help="Address to serve metrics on; whoever reaches it may read them.",
)
@click.option(
    "--traces/--no-traces",
    default=None,
    help="Send OpenTelemetry traces where the OTEL_ variables say. Default: if they name an endpoint or an exporter.",
)
@click.option(
    "--log-format",
    envvar="LOG_FORMAT",
    default=TELEMETRY.log_format,
    show_default=True,
    type=click.Choice(LOG_FORMATS),
    help="json: one object per line.",
)
@click.option(
    "--log-level",
    envvar="LOG_LEVEL",
    default=TELEMETRY.log_level,
    show_default=True,
    type=click.Choice(LOG_LEVELS, case_sensitive=False),
    help="The least that is logged.",
)
@click.option("--log-prompts", envvar="LOG_PROMPTS", is_flag=True, help="Write prompts into the log.")
def serve(**flags: Any) -> None:
    """Serve a pair of models until SIGTERM or Ctrl-C; a second signal stops at once."""
    _start(flags)


@main.command()
@click.option("--http-host", envvar="HTTP_HOST", default=HTTP.host, show_default=True, help="Address of the HTTP port.")
@click.option(
    "--http-port",
    envvar="HTTP_PORT",
    default=HTTP.port,
    show_default=True,
    type=click.IntRange(0, 65535),
    help="0 picks a free one.",
)
def gateway(http_host: str, http_port: int, **flags: Any) -> None:
    """Serve as `serve` does, and put Envoy before it: JSON over HTTP, gRPC and gRPC-Web on one port."""
    _start(flags, HttpConfig(http_host, http_port))


gateway.params += serve.params


def _start(flags: dict[str, Any], http: HttpConfig | None = None) -> None:
    configure_logging(flags["log_format"], flags["log_level"])
    try:
        config = _config(flags)
        if http is not None and config.access.tls_cert is not None:
            raise ConfigError(
                "The gateway's Envoy and its server speak plain text on one machine; leave out TLS_CERT, and put TLS "
                "before HTTP_PORT, or use deploy/envoy with `lda-service serve`."
            )
        if not flags["model_after_id"]:
            log.warning("%s", BUNDLED_NOTICE)
        if config.telemetry.log_prompts:
            log.warning("%s", PROMPTS_NOTICE)
        _run(_hold_ranks(config) if config.vllm.node_rank else _serve(config, http))
    except LdaError as error:
        _fail(error)


def _config(flags: dict[str, Any]) -> Config:
    """The settings that flags of the same names give. Raises `ConfigError`."""
    flags = dict(flags)
    after, before = pair_ids(flags.pop("model_after_id"), flags.pop("model_before_id"))
    engine, server, admission, access, telemetry, vllm = (
        {field.name: flags.pop(field.name) for field in fields(kind) if field.name in flags}
        for kind in (EngineConfig, ServerConfig, AdmissionConfig, AccessConfig, TelemetryConfig, VllmConfig)
    )
    return Config(
        backend=flags.pop("backend"),
        vllm=VllmConfig(**vllm),
        pair=PairConfig(after, before, **flags),
        engine=EngineConfig(**engine),
        server=ServerConfig(**server),
        admission=AdmissionConfig(**admission),
        access=AccessConfig(**access),
        telemetry=TelemetryConfig(**telemetry),
    )


@main.command()
@click.option("--port", default=0, show_default=True, type=click.IntRange(0, 65535), help="0 picks a free one.")
@click.option("--picture", type=click.Path(dir_okay=False, path_type=Path), help="Draw the output into an SVG file.")
def demo(port: int, picture: Path | None) -> None:
    """Serve the bundled pair and show what amplification finds in it."""
    from lda_service.demo import run

    try:
        run(port, picture)
    except LdaError as error:
        _fail(error)


@main.command()
@click.option("--host", envvar="HOST", default=SERVER.host, show_default=True, help="Address the server listens on.")
@click.option("--port", envvar="PORT", default=SERVER.port, show_default=True, type=click.IntRange(1, 65535))
@click.option("--timeout", default=3.0, show_default=True, type=click.FloatRange(min=0.1), help="Seconds to wait.")
@probe_options
def health(host: str, port: int, timeout: float, **probe: Any) -> None:
    """Ask a server whether it serves: exit 0 if so, 1 if not. For container health checks."""
    from lda_service.cli_access import probe_arguments
    from lda_service.rpc.health import check

    try:
        arguments = probe_arguments(port, **probe)
    except LdaError as error:
        _fail(error)
    status = check("127.0.0.1" if host in ("0.0.0.0", "::") else host, timeout_s=timeout, **arguments)
    click.echo(status)
    sys.exit(0 if status == "SERVING" else 1)


main.add_command(token)
main.add_command(doctor)


async def _hold_ranks(config: Config) -> None:
    """What a machine of a group does that does not serve."""
    from lda_service.worker.headless import run

    group = config.vllm
    click.echo(f"machine {group.node_rank} of {group.nnodes}: serves nothing, waits for {group.master_addr}")
    await run(config, lambda pair: click.echo(f"ready: {pair.after.model_id} vs {pair.before.model_id}"))


async def _serve(config: Config, http: HttpConfig | None) -> None:
    from lda_service.rpc.server import LdaServer, run

    server = LdaServer(config)

    def on_listening(port: int) -> None:
        click.echo(f"listening on {config.server.host}:{port}")
        if server.telemetry.metrics_url is not None:
            click.echo(f"metrics on {server.telemetry.metrics_url}")

    def on_ready(pair: PairInfo) -> None:
        click.echo(f"ready: {pair.after.model_id} vs {pair.before.model_id} on {pair.device} ({pair.after.dtype})")

    if http is None:
        await run(server, on_listening, on_ready)
        return
    from lda_service import gateway as front
    from lda_service.rpc.access import tell_exposure

    host = http.host
    tell_exposure(config.access, host, http.port)

    def on_http(port: int) -> None:
        click.echo(f"http on http://{host}:{port}")

    await front.run(server, config.server, http, on_listening, on_http, on_ready)


def _run(work: Coroutine[Any, Any, None]) -> None:
    """Run on uvloop, which has the shorter tail latencies, where it exists."""
    try:
        import uvloop
    except ImportError:
        asyncio.run(work)
    else:
        uvloop.run(work)


def _fail(error: LdaError) -> None:
    """One sentence with its remedy, and the figures behind it."""
    click.echo(f"lda-service: {error.message}", err=True)
    for name, value in error.metadata.items():
        click.echo(f"  {name}: {value}", err=True)
    sys.exit(1)
