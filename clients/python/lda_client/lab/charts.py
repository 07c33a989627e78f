"""Charts as inline SVG: numbers in, pictures out. Knows nothing of runs.

Drawn by matplotlib. Lines and letters take the colour of the text around them, and fills are translucent, so that a
chart reads on a light page, on a dark one, and on paper.
"""

from __future__ import annotations

import io
import math
import re
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any, Literal

from lda_client.lab._pages import Exhibit, percent

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lda_client.lab.estimate import AlphaRate

INK = "#123456"  # stands for the colour of the surrounding text until the drawing is done
BLUE, ORANGE = "#3f83e0", "#e0702a"
LINEAR_FROM = 0.02  # rates that are all larger need no logarithmic axis
OPACITY_MAX = 0.6
Mark = Literal["up", "down", ""]
MARKS: Mapping[Mark, str] = {"up": " ▲", "down": " ▼", "": ""}

_STYLE: dict[Any, Any] = {
    "font.size": 9.5,
    "svg.fonttype": "none",
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}


@dataclass(frozen=True, slots=True)
class Answer:
    """An estimate, as a chart shows it at alpha 0."""

    name: str
    rate: float
    low: float
    high: float


def rates_chart(
    rates: Sequence[AlphaRate], dots: Sequence[tuple[float, float]], answers: Sequence[Answer] = ()
) -> Exhibit:
    """Rate against alpha.

    Args:
        rates: the line and its band.
        dots: (alpha, rate) of each prompt.
        answers: estimates for alpha 0, drawn beside it.
    """
    with _drawing(9.0, 3.7) as drawing:
        axes = drawing.axes
        alphas, shares = [each.alpha for each in rates], [each.hits / each.rollouts for each in rates]
        low, high = [each.low for each in rates], [each.high for each in rates]
        axes.fill_between(alphas, low, high, color=BLUE, alpha=0.22, linewidth=0)
        axes.scatter(*_columns(dots), s=9, color=INK, alpha=0.35, linewidths=0, label="one prompt", zorder=3)
        axes.plot(alphas, shares, color=BLUE, marker="o", markersize=4, label="all prompts, 95% band", zorder=4)
        _add_answers(axes, answers, max(alphas) - min(alphas))
        _scale_rates(axes, [*shares, *(answer.rate for answer in answers)], max(each.rollouts for each in rates))
        axes.set_xlabel("alpha")
        axes.set_ylabel("share of rollouts")
        axes.legend(frameon=False, loc="best", fontsize=8)
        spoken = ", ".join(f"{share:.3%} at alpha {alpha:g}" for alpha, share in zip(alphas, shares, strict=True))
        return drawing.exhibit(f"Rate against alpha: {spoken}.")


def _columns(pairs: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [each[0] for each in pairs], [each[1] for each in pairs]


def _add_answers(axes: Any, answers: Sequence[Answer], span: float) -> None:
    """Beside each other, a little left of 0, so that intervals do not hide one another."""
    for place, answer in enumerate(answers, 1):
        errors = [[answer.rate - answer.low], [answer.high - answer.rate]]
        axes.errorbar(
            [-0.018 * (span or 1) * place],
            [answer.rate],
            yerr=[[max(0.0, each[0])] for each in errors],
            fmt=("D", "s", "^")[(place - 1) % 3],
            markersize=4,
            capsize=2,
            color=ORANGE,
            label=f"unmodified: {answer.name}",
            zorder=5,
        )


def _scale_rates(axes: Any, rates: Sequence[float], rollouts: int) -> None:
    """A linear axis, or one that is logarithmic down to what one rollout can show and has a place for 0."""
    if min(rates) >= LINEAR_FROM:
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(lambda value, _: percent(value))
        return
    floor = 10.0 ** math.floor(math.log10(min([1 / rollouts, *(rate for rate in rates if rate > 0)])))
    axes.set_yscale("symlog", linthresh=floor, linscale=0.5)
    top = max(1, math.ceil(-math.log10(floor)))
    axes.set_yticks([0.0, *(10.0**-power for power in range(top, -1, -1))])
    axes.yaxis.set_major_formatter(lambda value, _: percent(value))
    axes.set_ylim(0, min(1.3, 4 * max([*rates, floor])))


def heat_map(
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    rates: Sequence[Sequence[float]],
    marks: Sequence[Sequence[Mark]],
) -> Exhibit:
    """Rates as a grid of cells, the more opaque the larger, on a logarithmic scale.

    Args:
        title: above it.
        rows: their names, from the top.
        columns: their names.
        rates: one row for each of `rows`; NaN is an empty cell.
        marks: cells that differ from what was expected, and which way.
    """
    lowest = min((rate for row in rates for rate in row if rate > 0), default=1.0)
    with _drawing(1.6 + 0.95 * len(columns), 0.8 + 0.36 * len(rows)) as drawing:
        axes = drawing.axes
        for y, row in enumerate(rates):
            for x, rate in enumerate(row):
                _cell(drawing, x, y, rate, marks[y][x], _opacity(rate, lowest))
        axes.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(rows) - 0.5, -0.5), xlabel="alpha")
        axes.set_xticks(range(len(columns)), columns)
        axes.set_yticks(range(len(rows)), rows)
        axes.tick_params(length=0)
        axes.set_title(title, fontsize=9, loc="left")
        for spine in axes.spines.values():
            spine.set_visible(False)
        return drawing.exhibit(f"{title}: rates of {', '.join(rows)} at alpha {', '.join(columns)}.")


def _opacity(rate: float, lowest: float) -> float:
    """Of a cell: 0 for a rate of 0, the full one for a rate of 1."""
    if not rate > 0:
        return 0.0
    reach = 1 - math.log(rate) / math.log(lowest) if lowest < 1 else 1.0
    return OPACITY_MAX * (0.12 + 0.88 * reach)


def _cell(drawing: _drawing, x: int, y: int, rate: float, mark: Mark, opacity: float) -> None:
    from matplotlib.patches import Rectangle

    corner = (x - 0.48, y - 0.46)
    colour, alpha = (ORANGE, opacity) if opacity else (INK, 0.05)
    drawing.axes.add_patch(Rectangle(corner, 0.96, 0.92, facecolor=colour, alpha=alpha, linewidth=0))
    if mark:
        drawing.axes.add_patch(Rectangle(corner, 0.96, 0.92, fill=False, edgecolor=INK, linewidth=1.4))
    shown = "" if math.isnan(rate) else percent(rate) + MARKS[mark]
    weight = "bold" if mark else "normal"
    drawing.axes.text(x, y, shown, ha="center", va="center", fontsize=8, fontweight=weight)


class _drawing:  # noqa: N801  # reads as what it is: `with _drawing(...) as drawing`
    """A figure of this size in inches, with one pair of axes."""

    def __init__(self, width: float, height: float) -> None:
        import matplotlib as mpl
        from matplotlib.figure import Figure

        self._style = mpl.rc_context({**_STYLE, "svg.hashsalt": f"{width} {height}"})
        self._style.__enter__()
        self._figure = Figure(figsize=(width, height), layout="constrained")
        self.axes = self._figure.add_subplot()

    def __enter__(self) -> _drawing:
        return self

    def __exit__(self, *error: object) -> None:
        self._style.__exit__(None, None, None)

    def exhibit(self, description: str) -> Exhibit:
        """What was drawn, as SVG for a page."""
        file = io.StringIO()
        self._figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        return Exhibit(_inline(file.getvalue(), description))


def _inline(svg: str, description: str) -> str:
    """An SVG file as an element that takes the colour and the letters of its page."""
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", svg)
    svg = re.sub(r"font: ((?:bold |[0-9]+ )?[\d.]+px)[^;\"]*", r"font: \1 system-ui, sans-serif", svg)
    svg = svg.replace(INK, "currentColor")
    label = escape(description, quote=True)
    root = f'<svg class="chart" role="img" aria-label="{label}" stroke-linejoin="round" '
    return svg.replace("<svg ", root, 1)
