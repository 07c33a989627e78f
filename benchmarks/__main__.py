"""The command `python -m benchmarks`: choose, run, save after every workload, report."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import click

from benchmarks import report
from benchmarks.processes import ROOT
from benchmarks.workloads import BUNDLED, ENGINES, PAIRS, STUDIES, WORKLOADS

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.run import Bench, Options
    from benchmarks.workloads import Workload

RESULTS = ROOT / "benchmarks" / "results"
MODELS = ROOT / ".bench" / "models"
LOGS = ROOT / ".bench" / "logs"
QUICK = ("one", "rows-4")


@click.command()
@click.option("--only", multiple=True, metavar="NAME", help="A workload or study; may be repeated. See --list.")
@click.option("--engine", multiple=True, metavar="NAME", help="An engine; may be repeated. See --list.")
@click.option("--repetitions", default=5, show_default=True, type=click.IntRange(1))
@click.option(
    "--budget",
    default=300.0,
    show_default=True,
    help="Seconds of decoding after which an engine has no further repetitions in a workload.",
)
@click.option("--dtype", multiple=True, metavar="ENGINE=DTYPE", help="Instead of the one chosen for this machine.")
@click.option("--name", help="Folder under benchmarks/results; default: the processor's name.")
@click.option("--quick", is_flag=True, help="One repetition of two small workloads: does everything work?")
@click.option("--list", "show", is_flag=True, help="Name workloads, studies and engines, and stop.")
@click.option("--report", "report_only", is_flag=True, help="Write table and plot of existing results again, and stop.")
def main(
    only: tuple[str, ...],
    engine: tuple[str, ...],
    repetitions: int,
    budget: float,
    dtype: tuple[str, ...],
    name: str | None,
    quick: bool,
    show: bool,
    report_only: bool,
) -> None:
    """Measure this project's engine and its peers on the machine at hand.

    A second run under one name replaces what it measures again and keeps the rest.
    """
    if show:
        click.echo(listing())
        return
    chosen = choose(only or (QUICK if quick else ()), "workload or study", [*WORKLOADS, *STUDIES])
    engines = choose(engine, "engine", list(ENGINES))
    folder = RESULTS / (name or default_name())
    if not report_only:
        from benchmarks.run import Options

        options = Options(1 if quick else repetitions, budget, LOGS, parse_dtypes(dtype))
        run(chosen, engines, options, folder, quick)
    results = load(folder)
    click.echo(write_report(folder, results))
    if failed := report.failures(results):
        raise click.ClickException("; ".join(failed))


def listing() -> str:
    """What can be named."""
    lines = ["workloads:", *(f"  {w.name:18} {w.title}; {', '.join(w.engines)}" for w in WORKLOADS.values())]
    lines += ["studies:", *(f"  {name:18} {text}" for name, text in STUDIES.items())]
    lines += ["engines:", *(f"  {name:18} {text}" for name, text in ENGINES.items())]
    return "\n".join(lines)


def choose(names: tuple[str, ...], kind: str, known: list[str]) -> list[str]:
    """The names, in the order in which they are known; all if there are none. Raises click.UsageError."""
    for name in names:
        if name not in known:
            raise click.UsageError(f"There is no {kind} {name!r}; choose from: {', '.join(known)}.")
    return [name for name in known if name in names or not names]


def parse_dtypes(pairs: tuple[str, ...]) -> dict[str, str]:
    """ENGINE=DTYPE by engine. Raises click.UsageError."""
    dtypes = {}
    for pair in pairs:
        engine, _, dtype = pair.partition("=")
        choose((engine,), "engine", list(ENGINES))
        if dtype not in ("float32", "bfloat16", "float16", "auto"):
            raise click.UsageError(f"--dtype {pair}: use ENGINE=float32, bfloat16, float16 or auto.")
        dtypes[engine] = dtype
    return dtypes


def default_name() -> str:
    """The processor and its cores, as a folder's name."""
    import os

    from benchmarks.machine import cpu_name

    return re.sub(r"[^a-z0-9]+", "-", f"{cpu_name()} {os.cpu_count()} cores".lower()).strip("-")


def run(chosen: list[str], engines: list[str], options: Options, folder: Path, quick: bool) -> None:
    """Measure, and save after each workload: what is measured is not lost to what comes after it."""
    from benchmarks.run import Bench

    workloads = [WORKLOADS[name] for name in chosen if name in WORKLOADS]
    bench = Bench(options, model_folders(workloads, chosen))
    try:
        for workload in workloads:
            able = [engine for engine in workload.engines if engine in engines]
            if able:
                measured = bench.workload(workload.quick() if quick else workload, able)
                save(folder, bench, "workloads", workload.name, measured)
        for name in [name for name in chosen if name in STUDIES and "ours" in engines]:
            save(folder, bench, "studies", name, getattr(bench, name.replace("-", "_"))())
    finally:
        bench.close()


def model_folders(workloads: list[Workload], chosen: list[str]) -> dict[str, dict[str, str]]:
    """Folders by pair and role; the pairs that are needed are made if they are not there."""
    from benchmarks.models import ensure_pair
    from lda_service.pairs import demo

    needed = {workload.pair for workload in workloads}
    if any(name in STUDIES for name in chosen):
        needed.add("bench-190m")
    made = {name: ensure_pair(PAIRS[name], MODELS) for name in PAIRS if name in needed}
    folders = {name: {role: str(path) for role, path in paths.items()} for name, paths in made.items()}
    return folders | {BUNDLED: {"after": str(demo.AFTER_DIR), "before": str(demo.BEFORE_DIR)}}


def save(folder: Path, bench: Bench, section: str, name: str, measured: dict[str, Any]) -> None:
    """Put one measurement into `results.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    results |= {"title": folder.name, "machine": bench.machine, "commit": commit()}
    results.setdefault(section, {})[name] = measured
    path.write_text(json.dumps(results, indent=1) + "\n")


def commit() -> str:
    """The revision that is measured, marked if the files differ from it."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude=*"], cwd=ROOT, capture_output=True, text=True
        )
    except OSError:
        return "unknown"
    return described.stdout.strip() or "unknown"


def load(folder: Path) -> dict[str, Any]:
    """What was measured under this name. Raises click.ClickException."""
    path = folder / "results.json"
    if not path.exists():
        raise click.ClickException(f"{path} does not exist: nothing was measured under this name.")
    results: dict[str, Any] = json.loads(path.read_text())
    return results


def write_report(folder: Path, results: dict[str, Any]) -> str:
    """Write `report.md` and the plot beside the results; says where."""
    text = report.markdown(results)
    if report.plot(results, folder / "tokens_per_s.svg"):
        text += "\n![tokens/s against rows](tokens_per_s.svg)\n"
    else:
        click.echo("No plot: no workload rows-N was measured, or matplotlib is missing (the extra `bench`).", err=True)
    (folder / "report.md").write_text(text)
    return f"{text}\nWritten to {folder}."


if __name__ == "__main__":
    sys.exit(main())
