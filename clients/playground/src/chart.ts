// The rate against alpha with its interval, as a drawing that grows while completions arrive.

import { alphaText, draw, make } from "./dom";
import { percent, type Rate } from "./rates";

export interface Point {
  alpha: number;
  rate: Rate;
  isChosen: boolean;
}

const HEIGHT = 260;
const MARGIN = { top: 16, right: 20, bottom: 44, left: 56 };
/** Alphas that lie closer together than this are set side by side instead of to scale. */
const SCALE_MAX_SPAN = 4;

/** Draws points into a figure. */
export class Chart {
  private width = 480;
  private points: readonly Point[] = [];

  constructor(
    private readonly figure: HTMLElement,
    private readonly onChoose: (alpha: number) => void,
  ) {
    new ResizeObserver(([entry]) => {
      this.width = Math.max(260, Math.round(entry!.contentRect.width));
      this.show(this.points);
    }).observe(figure);
  }

  show(points: readonly Point[]): void {
    this.points = points;
    const focused = this.figure.querySelector<SVGElement>(":focus")?.dataset.alpha;
    this.figure.replaceChildren(this.drawing(), make("figcaption", { class: "note", text: caption(points) }));
    if (focused !== undefined) this.figure.querySelector<SVGElement>(`[data-alpha="${focused}"]`)?.focus();
  }

  private drawing(): SVGElement {
    const attributes = { viewBox: `0 0 ${this.width} ${HEIGHT}`, width: this.width, height: HEIGHT, role: "group" };
    const svg = draw("svg", { ...attributes, "aria-label": "Rate against alpha" });
    const x = this.horizontal();
    const top = ceiling(this.points);
    const y = (share: number) => HEIGHT - MARGIN.bottom - (share / top) * (HEIGHT - MARGIN.top - MARGIN.bottom);
    svg.append(...this.grid(y, top), ...this.labels(x));
    const known = this.points.filter(({ rate }) => rate.total > 0);
    if (known.length > 1) svg.append(band(known, x, y), line(known, x, y));
    svg.append(...known.map((point) => this.point(point, x, y)));
    return svg;
  }

  private horizontal(): (alpha: number) => number {
    const alphas = this.points.map(({ alpha }) => alpha);
    const [first, last] = [Math.min(...alphas), Math.max(...alphas)];
    const from = MARGIN.left + 16;
    const room = this.width - from - MARGIN.right - 16;
    if (alphas.length < 2) return () => from + room / 2;
    if (last - first <= SCALE_MAX_SPAN) return (alpha) => from + ((alpha - first) / (last - first)) * room;
    return (alpha) => from + (alphas.indexOf(alpha) / (alphas.length - 1)) * room;
  }

  private grid(y: (share: number) => number, top: number): SVGElement[] {
    return [0, 0.25, 0.5, 0.75, 1].flatMap((part) => {
      const at = y(part * top);
      const words = draw("text", { x: MARGIN.left - 8, y: at + 4, class: "tick y" }, axisText(part * top));
      return [draw("line", { x1: MARGIN.left, x2: this.width - MARGIN.right, y1: at, y2: at, class: "rule" }), words];
    });
  }

  private labels(x: (alpha: number) => number): SVGElement[] {
    const base = HEIGHT - MARGIN.bottom;
    let free = -Infinity;
    const ticks = this.points.flatMap(({ alpha }) => {
      if (x(alpha) < free) return [];
      free = x(alpha) + 34;
      return [draw("text", { x: x(alpha), y: base + 18, class: "tick" }, alphaText(alpha))];
    });
    const middle = (MARGIN.left + this.width - MARGIN.right) / 2;
    return [...ticks, draw("text", { x: middle, y: base + 38, class: "tick axis" }, "α")];
  }

  private point(point: Point, x: (alpha: number) => number, y: (share: number) => number): SVGElement {
    const { alpha, rate, isChosen } = point;
    const [at, low, high] = [x(alpha), y(rate.low), y(rate.high)];
    const name = `Alpha ${alphaText(alpha)}: ${percent(rate.rate)}, ${rate.hits} of ${rate.total}`;
    const attributes = {
      class: "point",
      role: "button",
      tabindex: 0,
      "aria-label": name,
      "aria-pressed": String(isChosen),
    };
    const group = draw(
      "g",
      { ...attributes, "data-alpha": alpha },
      draw("title", {}, name),
      draw("rect", {
        x: at - 14,
        y: MARGIN.top,
        width: 28,
        height: HEIGHT - MARGIN.top - MARGIN.bottom,
        class: "reach",
      }),
      draw("path", { d: `M${at - 4} ${high}h8M${at} ${high}V${low}M${at - 4} ${low}h8`, class: "whisker" }),
      draw("circle", { cx: at, cy: y(rate.rate), r: isChosen ? 6 : 4.5, class: "dot" }),
    );
    group.addEventListener("click", () => this.onChoose(alpha));
    group.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      this.onChoose(alpha);
    });
    return group;
  }
}

function axisText(share: number): string {
  return `${Number((share * 100).toPrecision(3))}%`;
}

function band(points: readonly Point[], x: (alpha: number) => number, y: (share: number) => number): SVGElement {
  const upper = points.map(({ alpha, rate }) => `${x(alpha)},${y(rate.high)}`);
  const lower = points.map(({ alpha, rate }) => `${x(alpha)},${y(rate.low)}`).reverse();
  return draw("polygon", { points: [...upper, ...lower].join(" "), class: "band" });
}

function line(points: readonly Point[], x: (alpha: number) => number, y: (share: number) => number): SVGElement {
  return draw("polyline", {
    points: points.map(({ alpha, rate }) => `${x(alpha)},${y(rate.rate)}`).join(" "),
    class: "curve",
  });
}

/** The upper end of the axis: a round number above all that is worth seeing. */
export function ceiling(points: readonly Point[]): number {
  const highest = Math.max(0, ...points.map(({ rate }) => (rate.total > 0 ? rate.high : 0)));
  return [0.004, 0.01, 0.02, 0.04, 0.1, 0.2, 0.4, 0.6, 0.8].find((top) => highest <= top) ?? 1;
}

function caption(points: readonly Point[]): string {
  const isCounting = points.some(({ rate }) => rate.total > 0);
  return isCounting ? "Rate of matches among finished completions, exact 95% intervals." : "Write a filter to count.";
}
