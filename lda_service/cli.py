"""The command `lda-service`, and the only place that reads the environment.

Turns flags, or the environment variables that are their twins, into a `Config`, and start-up errors into one sentence
on stderr and exit code 1. Everything heavy is imported inside the commands: the worker process imports this module too.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lda_service import __version__
from lda_service.config import DTYPES, QUANTIZE, SPECULATION, Config, EngineConfig, PairConfig, ServerConfig, pair_ids
from lda_service.errors import LdaError
from lda_service.telemetry import configure_logging

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from typing import Any

    from lda_service.pair_info import PairInfo

BUNDLED_NOTICE = """
********************************************************************************
*  NO MODELS SET: SERVING THE BUNDLED DEMO PAIR, TWO TINY TOY MODELS.          *
*  Set MODEL_AFTER_ID and MODEL_BEFORE_ID to serve models of your own.         *
********************************************************************************"""

ENGINE, SERVER = EngineConfig(), ServerConfig()

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
    default=SERVER.drain_grace_s,
    show_default=True,
    type=click.FloatRange(min=0),
    help="Seconds that running streams get at shutdown.",
)
def serve(
    model_after_id: str | None,
    model_before_id: str | None,
    device: str,
    dtype: str,
    quantize: str,
    host: str,
    port: int,
    max_running_sequences: int,
    max_queued_requests: int,
    kv_cache_tokens: int,
    deterministic: bool,
    native: bool,
    speculation: str,
    allow_incompatible: bool,
    drain_grace: float,
) -> None:
    """Serve a pair of models until SIGTERM or Ctrl-C; a second signal stops at once."""
    configure_logging()
    try:
        after, before = pair_ids(model_after_id, model_before_id)
        config = Config(
            pair=PairConfig(after, before, device, dtype, allow_incompatible, native, quantize),
            engine=EngineConfig(
                max_running_sequences=max_running_sequences,
                max_queued_requests=max_queued_requests,
                kv_cache_tokens=kv_cache_tokens,
                deterministic=deterministic,
                speculation=speculation,
            ),
            server=ServerConfig(host, port, drain_grace),
        )
        if not model_after_id:
            log.warning("%s", BUNDLED_NOTICE)
        _run(_serve(config))
    except LdaError as error:
        _fail(error)


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
def health(host: str, port: int, timeout: float) -> None:
    """Ask a server whether it serves: exit 0 if so, 1 if not. For container health checks."""
    from lda_service.rpc.health import check

    status = check("127.0.0.1" if host in ("0.0.0.0", "::") else host, port, timeout)
    click.echo(status)
    sys.exit(0 if status == "SERVING" else 1)


async def _serve(config: Config) -> None:
    from lda_service.rpc.server import LdaServer, run

    def on_listening(port: int) -> None:
        click.echo(f"listening on {config.server.host}:{port}")

    def on_ready(pair: PairInfo) -> None:
        click.echo(f"ready: {pair.after.model_id} vs {pair.before.model_id} on {pair.device} ({pair.after.dtype})")

    await run(LdaServer(config), on_listening, on_ready)


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
