"""Results as a Markdown report and a plot. Reads `results.json` alone, so that a report can be made again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks.processes import DISTURBED
from benchmarks.workloads import ENGINES, ROW_COUNTS, STUDIES

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

Results = dict[str, Any]


def markdown(results: Results) -> str:
    """The whole report."""
    workloads = results.get("workloads", {})
    parts = [
        "# Benchmark results",
        machine(results),
        "## Tokens/s of the pair",
        "Median, least to most in brackets, `n` repetitions. The ratio is ours over the peer's. The limit is what the "
        "machine's memory and matrix products allow, both measured in the same run.",
        rates(workloads.values()),
        steps(workloads),
        notes(workloads.values()),
        studies(results.get("studies", {})),
        versions(workloads.values()),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def machine(results: Results) -> str:
    """The machine's names and what it was measured to do."""
    measured = results["machine"]
    names = ", ".join(f"{key} {value}" for key, value in measured["names"].items())
    busy = "; **something else used the processor meanwhile**" if measured["others_cores"] > DISTURBED else ""
    return (
        f"Machine: {names}. Memory read {measured['bytes_per_s'] / 1e9:.1f} GB/s, "
        f"matrix peak {measured['flops_per_s'] / 1e9:.0f} GF/s{busy}. Commit {results.get('commit', 'unknown')}."
    )


def rates(workloads: Iterable[Results]) -> str:
    """One line for each workload: the limit, and every engine beside ours."""
    rows = []
    for workload in workloads:
        limit, engines = workload["limit_tokens_per_s"], workload["engines"]
        ours = _median(engines.get("ours"))
        cells = [_engine(engines.get(name), ours if name != "ours" else None) for name in ENGINES]
        share = f"{ours / limit:.0%}" if ours and limit else ""
        rows.append([workload["title"], f"{limit:.0f}" if limit else "", *cells, share])
    return table(["workload", "limit", *ENGINES, "ours of limit"], rows) if rows else ""


def _engine(record: Results | None, ours: float | None) -> str:
    if record is None:
        return ""
    if record["summary"] is None:
        return "not measured"
    summary = record["summary"]
    spread = f" ({summary['least']:.3g}-{summary['most']:.3g}), n {summary['count']}"
    ratio = f", **{ours / summary['median']:.2f}x**" if ours else ""
    partly = " *" if _is_partial(record) else ""
    return f"{summary['median']:.3g}{spread}{partly}{ratio}"


def _is_partial(record: Results) -> bool:
    return any(run["partial"] for run in record["runs"])


def _median(record: Results | None) -> float | None:
    return record["summary"]["median"] if record and record["summary"] else None


def steps(workloads: dict[str, Results]) -> str:
    """Milliseconds of our decode step against rows."""
    rows = []
    for count in ROW_COUNTS:
        record = workloads.get(f"rows-{count}", {}).get("engines", {}).get("ours")
        times = sorted(run["step_ms"] for run in record["runs"] if run["step_ms"]) if record else []
        if times:
            rows.append([str(count), f"{times[len(times) // 2]:.1f}", f"{times[0]:.1f}-{times[-1]:.1f}"])
    if not rows:
        return ""
    return "## Cost of a step\n\n" + table(["rows", "ms, median", "least to most"], rows)


def notes(workloads: Iterable[Results]) -> str:
    """What did not run, or ran in part."""
    lines = []
    for workload in workloads:
        for name, record in workload["engines"].items():
            if record["note"]:
                lines.append(f"- {workload['name']}, {name}: {record['note']}")
            if any(run["others_cores"] > DISTURBED for run in record["runs"]):
                lines.append(f"- {workload['name']}, {name}: something else used the processor; measure again")
            if _is_partial(record):
                lines.append(f"- {workload['name']}, {name} (*): measured on {record['runs'][0]['rows']} rows only")
    return "## Notes\n\n" + "\n".join(lines) if lines else ""


def studies(found: dict[str, Results]) -> str:
    """The studies' figures."""
    rows = [[name, STUDIES[name], _study(name, found[name])] for name in STUDIES if name in found]
    return "## Studies\n\n" + table(["study", "question", "answer"], rows) if rows else ""


def _study(name: str, answer: Results) -> str:
    if name == "memory":
        return f"{answer['held_tokens']} of {answer['needed_tokens']} positions: {answer['ratio']:.3f}"
    if name == "first-token":
        return f"{answer['idle_steps']} idle, {answer['busy_steps']} busy: {answer['later']} later"
    return "; ".join(
        f"{calls.removeprefix('calls-')} calls: {part['stream']['median']:.3g} against {part['ours']['median']:.3g} "
        f"tokens/s, {part['ratio']:.1%}"
        for calls, part in answer.items()
    )


def versions(workloads: Iterable[Results]) -> str:
    """Each engine's versions, threads and dtypes."""
    seen: dict[str, None] = {}
    for workload in workloads:
        for name, record in workload["engines"].items():
            if record["versions"]:
                seen[f"- {name}: " + ", ".join(f"{k} {v}" for k, v in record["versions"].items())] = None
    return "## Versions\n\n" + "\n".join(seen) if seen else ""


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def failures(results: Results) -> list[str]:
    """What went wrong with ours: the peers' troubles are notes, ours are errors."""
    records = {name: each["engines"].get("ours") for name, each in results.get("workloads", {}).items()}
    return [f"{name}: {record['note']}" for name, record in records.items() if record and record["note"]]


def plot(results: Results, path: Path) -> bool:
    """Draw tokens/s against rows, with the limit; False if nothing was measured or matplotlib is not there."""
    series = _series(results.get("workloads", {}))
    if not series:
        return False
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, points in series.items():
        rows, middle, least, most = zip(*points, strict=True)
        if name == "limit":
            axes.plot(rows, middle, "k--", label="limit of the machine")
        else:
            errors = [
                [m - low for m, low in zip(middle, least, strict=True)],
                [high - m for m, high in zip(middle, most, strict=True)],
            ]
            axes.errorbar(rows, middle, errors, marker="o", capsize=3, label=ENGINES[name])
    axes.set(xscale="log", yscale="log", xlabel="rows (sequences of one prompt)", ylabel="tokens/s of the pair")
    axes.set_xticks(ROW_COUNTS, [str(n) for n in ROW_COUNTS])
    axes.minorticks_off()
    axes.set_title(results["title"])
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, metadata={"Date": None})
    return True


def _series(workloads: dict[str, Results]) -> dict[str, list[tuple[float, float, float, float]]]:
    """By engine, and "limit": (rows, median, least, most)."""
    series: dict[str, list[tuple[float, float, float, float]]] = {}
    for count in ROW_COUNTS:
        workload = workloads.get(f"rows-{count}")
        if workload is None:
            continue
        limit = workload["limit_tokens_per_s"]
        series.setdefault("limit", []).append((count, limit, limit, limit))
        for name, record in workload["engines"].items():
            if record["summary"]:
                s = record["summary"]
                series.setdefault(name, []).append((count, s["median"], s["least"], s["most"]))
    return series
