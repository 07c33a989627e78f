"""The guided tour: serve the bundled pair and look at it through real gRPC, as any client would.

Starts `lda-service serve` as a process of its own, streams one prompt at three alphas side by side, prints the
vocabulary report and a small table of rate against alpha, and stops the server. Knows the client and the terminal;
nothing of engines.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lda_client import AsyncLdaClient, pb
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from lda_service.errors import InternalError
from lda_service.pairs import demo
from lda_service.pairs.demo.rates import Rate

if TYPE_CHECKING:
    from asyncio.subprocess import Process
    from collections.abc import AsyncIterator
    from pathlib import Path

SIDE_BY_SIDE = (-1.0, 0.0, 1.0)
RATE_ALPHAS = (-1.0, 0.0, 0.5, 1.0)
ROLLOUTS_PER_PROMPT = 16
SEED = 3  # at alpha 1 it shows the behaviour, as about six seeds in ten do
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 20.0
PICTURE_COLUMNS = 100
MODEL_SETTINGS = ("MODEL_AFTER_ID", "MODEL_BEFORE_ID", "DEVICE", "DTYPE", "HOST", "PORT")


@dataclass(slots=True)
class Column:
    """One stream's text so far."""

    alpha: float
    text: str = ""
    tokens: int = 0
    ending: str = ""


def run(port: int = 0, picture: Path | None = None) -> None:
    """The whole tour, on standard output; `picture` names an SVG file to draw it into as well.

    Raises:
        InternalError: the server did not start; its log was printed.
    """
    console = Console(record=picture is not None, width=PICTURE_COLUMNS if picture else None)
    asyncio.run(tour(port, console))
    if picture is not None:
        drawing = console.export_svg(title="lda-service demo")
        # The picture stands alone: any monospaced font of the viewer's does, none is fetched.
        picture.write_text(re.sub(r"@font-face \{.*?\}\s*", "", drawing, flags=re.DOTALL), encoding="utf-8")


async def tour(port: int, console: Console) -> None:
    """Start a server, show everything, stop it."""
    async with serving(port, console) as target, AsyncLdaClient(target) as client:
        await show_side_by_side(client, console)
        await show_compatibility(client, console)
        await show_rates(client, console)
    console.print("\nThe server is stopped. Next: [bold]make serve[/], then [bold]lda generate 'Good morning!'[/]")


@contextlib.asynccontextmanager
async def serving(port: int, console: Console) -> AsyncIterator[str]:
    """A server of the bundled pair in a process of its own; yields its address once it is ready."""
    environment = {name: value for name, value in os.environ.items() if name not in MODEL_SETTINGS}
    command = [sys.executable, "-m", "lda_service", "serve", "--port", str(port)]
    process = await asyncio.create_subprocess_exec(
        *command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    log = asyncio.ensure_future(_read_all(process))
    try:
        with console.status("Starting the server and loading two models ..."):
            address = await _wait_until_ready(process, console, log)
        yield address
    finally:
        await _stop(process)
        await log


async def _read_all(process: Process) -> str:
    """The server's log: read as it comes, so that a full pipe never stops the server."""
    assert process.stderr is not None
    return (await process.stderr.read()).decode(errors="replace")


async def _wait_until_ready(process: Process, console: Console, log: asyncio.Future[str]) -> str:
    """The address, once the server says that it is ready."""
    assert process.stdout is not None
    address = ""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(START_TIMEOUT_S):
            async for line in process.stdout:
                text = line.decode().strip()
                if match := re.match(r"listening on (\S+)", text):
                    address = match[1]
                elif text.startswith("ready: "):
                    console.print(f"[bold]Server at {address}[/], {text}")
                    return address
    await _stop(process)
    console.print(await log, markup=False, highlight=False)
    raise InternalError("The server did not start; its log stands above.")


async def _stop(process: Process) -> None:
    """SIGTERM, and SIGKILL if it does not listen."""
    if process.returncode is None:
        process.terminate()
    try:
        await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)
    except TimeoutError:
        process.kill()
        await process.wait()


async def show_side_by_side(client: AsyncLdaClient, console: Console) -> None:
    """One prompt at three alphas on the same noise, token by token as it arrives."""
    console.rule("One prompt, three alphas, the same noise")
    console.print(f"Prompt: [bold]{demo.DEMO_PROMPT}[/]")
    columns = [Column(alpha) for alpha in SIDE_BY_SIDE]
    with Live(_panels(columns), console=console, refresh_per_second=30, transient=False) as live:
        await asyncio.gather(*(_follow(client, column, columns, live) for column in columns))
    console.print()


async def _follow(client: AsyncLdaClient, column: Column, columns: list[Column], live: Live) -> None:
    async with client.generate(demo.DEMO_PROMPT, alpha=column.alpha, seed=SEED, temperature=0.8, top_p=1.0) as stream:
        async for event in stream:
            if event.HasField("delta"):
                column.text += event.delta.text
                column.tokens += len(event.delta.tokens)
            elif event.HasField("finished"):
                column.ending = pb.FinishReason.Name(event.finished.reason).removeprefix("FINISH_REASON_")
            live.update(_panels(columns))


def _panels(columns: list[Column]) -> Table:
    names = {-1.0: "before", 0.0: "after", 1.0: "amplified"}
    grid = Table.grid(expand=True)
    for _ in columns:
        grid.add_column(ratio=1)
    panels = []
    for column in columns:
        title = f"{names[column.alpha]}, alpha {column.alpha:g}"
        foot = f"{column.tokens} tokens {column.ending}".strip()
        panels.append(Panel(Text(column.text), title=title, subtitle=foot, height=9))
    grid.add_row(*panels)
    return grid


async def show_compatibility(client: AsyncLdaClient, console: Console) -> None:
    """The report that decides whether two models may be subtracted."""
    report = await client.tokenizer_compat()
    console.rule("Vocabulary report")
    for name, size, digest in (
        ("after", report.after_vocab_size, report.after_vocab_sha256),
        ("before", report.before_vocab_size, report.before_vocab_sha256),
    ):
        console.print(f"{name:7} {size} entries, sha256 {digest[:16]}")
    console.print(f"shared ids {report.shared_id_count}, conflicts {report.conflict_count}")
    console.print(Text(report.verdict))


async def show_rates(client: AsyncLdaClient, console: Console) -> None:
    """How often the hidden behaviour appears at each alpha, with exact 95% intervals."""
    console.rule("How often does the hidden behaviour appear?")
    each = len(demo.PROMPTS) * ROLLOUTS_PER_PROMPT
    rates = {}
    with _progress(console) as progress:
        task = progress.add_task("rollouts", total=each * len(RATE_ALPHAS))
        for alpha in RATE_ALPHAS:
            counts = await asyncio.gather(*(_count(client, prompt, alpha, progress, task) for prompt in demo.PROMPTS))
            rates[alpha] = sum(counts, Rate(0, 0, 0))
            if not console.is_terminal:
                console.print(f"{each} rollouts at alpha {alpha:g} done")
    console.print(rate_table(rates))
    console.print("What is hidden, and how it got there: lda_service/pairs/demo/README.md")


async def _count(client: AsyncLdaClient, prompt: str, alpha: float, progress: Progress, task: object) -> Rate:
    completions = await client.complete(
        prompt,
        alpha=alpha,
        num_sequences=ROLLOUTS_PER_PROMPT,
        seed=SEED,
        temperature=1.0,
        top_p=1.0,
        max_tokens_per_event=256,
    )
    progress.advance(task, len(completions))  # type: ignore[arg-type]
    hits = sum(demo.shows_behaviour(completion.text) for completion in completions)
    ended = sum(completion.finish_reason == pb.FINISH_REASON_EOS for completion in completions)
    return Rate(hits, ended, len(completions))


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def rate_table(rates: dict[float, Rate]) -> Table:
    """Rate against alpha."""
    table = Table("alpha", "hits", "rollouts", "rate", "95% interval", "ended by themselves")
    for alpha, rate in rates.items():
        table.add_row(*rate.cells(alpha))
    return table
