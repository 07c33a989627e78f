// Completions at many alphas: how often the filter finds something in them, and what they say.

import { alphaText, byId, make } from "./dom";
import { Chart } from "./chart";
import { reasonOf } from "./comparison";
import { perFrame } from "./frames";
import { Matcher, type Matches } from "./matcher";
import type { Filter, Span } from "./matching";
import { percent, rateOf, type Rate } from "./rates";
import type { Batch, Rollout, RolloutsRun } from "./rollouts";

const HIGHLIGHTED_MAX = 5000;
/** Figures that change with every frame can be neither read nor heard. */
const RATES_PAUSE_MS = 200;

interface Item {
  element: HTMLLIElement;
  text: Text;
  meta: HTMLElement;
}

interface TableRow {
  row: HTMLElement;
  button: HTMLElement;
  cells: HTMLElement[];
}

export class RolloutsView {
  private readonly list = byId<HTMLOListElement>("completions");
  private readonly chart = new Chart(byId("chart"), (alpha) => this.choose(alpha));
  private readonly matcher = new Matcher((matches) => this.take(matches));
  private readonly drawRates = perFrame(() => this.showRates(), RATES_PAUSE_MS);
  private readonly drawList = perFrame(() => this.showList());
  private readonly drawMatches = perFrame(() => this.showMatches());
  private readonly items = new Map<Rollout, Item>();
  private readonly grown = new Map<Rollout, string>();
  private readonly byNumber: Rollout[] = [];
  private readonly hits = new Map<Batch, number>();
  private readonly tableRows = new Map<Batch, TableRow>();
  private matches: Matches = { examined: 0, found: new Map(), complaint: undefined };
  private run: RolloutsRun | undefined;
  private chosen: Batch | undefined;

  constructor(private alphas: readonly number[]) {
    const only = byId<HTMLInputElement>("only-matches");
    only.addEventListener("change", () => this.list.classList.toggle("only-matches", only.checked));
    this.showRates();
  }

  /** The alphas that the next run will have. */
  expect(alphas: readonly number[]): void {
    this.alphas = alphas;
    if (!this.run) this.drawRates();
  }

  /** Show this run, from its beginning. */
  show(run: RolloutsRun): void {
    this.run = run;
    this.byNumber.length = 0;
    this.matcher.clear();
    this.makeTable(run.batches);
    this.choose((run.batches.find(({ alpha }) => alpha === this.chosen?.alpha) ?? run.batches.at(-1)!).alpha);
  }

  look(filter: Filter): void {
    this.matcher.look(filter);
  }

  /** There is more text of this one. */
  grow(rollout: Rollout, text: string): void {
    if (rollout.batch !== this.chosen) return;
    this.grown.set(rollout, (this.grown.get(rollout) ?? "") + text);
    this.drawList();
  }

  finish(rollout: Rollout): void {
    rollout.number = this.matcher.add(rollout.text);
    this.byNumber[rollout.number] = rollout;
    if (rollout.batch === this.chosen && !this.grown.has(rollout)) this.grown.set(rollout, "");
    this.drawRates();
    this.drawList();
  }

  /** A batch began or ended, or the run did. */
  update(): void {
    this.drawRates();
    this.drawList();
  }

  private take(matches: Matches): void {
    this.matches = matches;
    this.hits.clear();
    for (const number of matches.found.keys()) {
      const batch = this.byNumber[number]?.batch;
      if (batch) this.hits.set(batch, (this.hits.get(batch) ?? 0) + 1);
    }
    this.drawRates();
    this.drawMatches();
  }

  /** Of what has been looked through; of nothing, if there is no filter. */
  private rate(batch: Batch): Rate {
    if (!this.matcher.isFiltering) return rateOf(0, 0);
    const isExamined = ({ number }: Rollout) => number !== undefined && number < this.matches.examined;
    return rateOf(this.hits.get(batch) ?? 0, batch.rollouts.filter(isExamined).length);
  }

  private choose(alpha: number): void {
    const batch = this.run?.batches.find((each) => each.alpha === alpha);
    if (!batch) return;
    this.chosen = batch;
    this.items.clear();
    this.grown.clear();
    this.list.replaceChildren();
    for (const rollout of batch.rollouts) this.grown.set(rollout, rollout.text);
    this.drawRates();
    this.drawList();
  }

  private showRates(): void {
    const batches = this.run?.batches ?? [];
    const rates = batches.map((batch) => ({ batch, rate: this.rate(batch) }));
    const empty = this.alphas.map((alpha) => ({ alpha, rate: rateOf(0, 0), isChosen: false }));
    const points = rates.map(({ batch, rate }) => ({ alpha: batch.alpha, rate, isChosen: batch === this.chosen }));
    this.chart.show(this.run ? points : empty);
    this.showTable(rates);
    this.showNote(rates);
  }

  private showTable(rates: readonly { batch: Batch; rate: Rate }[]): void {
    for (const { batch, rate } of rates) {
      const { row, button, cells } = this.tableRows.get(batch)!;
      const isChosen = batch === this.chosen;
      row.classList.toggle("chosen", isChosen);
      button.setAttribute("aria-pressed", String(isChosen));
      for (const [index, words] of rowWords(batch, rate).entries()) cells[index]!.textContent = words;
    }
  }

  private makeTable(batches: readonly Batch[]): void {
    this.tableRows.clear();
    const rows = batches.map((batch) => {
      const cells = rowWords(batch, rateOf(0, 0)).map(() => make("td"));
      const name = alphaText(batch.alpha);
      const on = { click: () => this.choose(batch.alpha) };
      const label = { "aria-label": `Show alpha ${name}` };
      const button = make("button", { type: "button", class: "quiet", text: name, on, ...label });
      const row = make("tr", {}, make("th", { scope: "row" }, button), ...cells);
      this.tableRows.set(batch, { row, button, cells });
      return row;
    });
    document.querySelector("#rates tbody")!.replaceChildren(...rows);
  }

  private showNote(rates: readonly { rate: Rate }[]): void {
    const field = byId<HTMLInputElement>("filter");
    const { complaint } = this.matches;
    field.setAttribute("aria-invalid", String(complaint !== undefined));
    const hits = rates.reduce((sum, { rate }) => sum + rate.hits, 0);
    const total = rates.reduce((sum, { rate }) => sum + rate.total, 0);
    const words = complaint ?? (total > 0 ? `${hits} of ${total} completions.` : "");
    const note = byId("filter-note");
    note.setAttribute("aria-live", this.run?.isRunning ? "off" : "polite");
    if (note.textContent !== words) note.textContent = words;
  }

  private showList(): void {
    const { chosen } = this;
    if (!chosen) return;
    byId("chosen").textContent =
      `α = ${alphaText(chosen.alpha)}: ${chosen.finishedCount} of ${chosen.asked} completions`;
    const isNew = this.grown.size > 0;
    for (const [rollout, text] of this.grown) this.append(rollout, text);
    this.grown.clear();
    if (isNew) this.drawMatches();
  }

  private append(rollout: Rollout, text: string): void {
    const item = this.items.get(rollout) ?? this.item(rollout);
    if (text) item.text.appendData(text);
    if (rollout.finished && item.meta.dataset.ended === undefined) {
      item.meta.dataset.ended = "";
      item.meta.textContent = `${rollout.index + 1} · ${reasonOf(rollout.finished)}`;
    }
  }

  /** In the order of their indices, though sequences begin in any. */
  private item(rollout: Rollout): Item {
    const text = document.createTextNode("");
    const meta = make("span", { class: "meta", text: String(rollout.index + 1) });
    const element = make("li", {}, meta, make("p", {}, text));
    const item = { element, text, meta };
    this.items.set(rollout, item);
    element.dataset.index = String(rollout.index);
    let after = this.list.lastElementChild as HTMLElement | null;
    while (after && Number(after.dataset.index) > rollout.index)
      after = after.previousElementSibling as HTMLElement | null;
    if (after) after.after(element);
    else this.list.prepend(element);
    return item;
  }

  /** Flag the items that match, and paint the matches: ranges over text nodes, so that no node is touched. */
  private showMatches(): void {
    const ranges: Range[] = [];
    for (const [rollout, { element, text }] of this.items) {
      const spans = rollout.number === undefined ? undefined : this.matches.found.get(rollout.number);
      element.classList.toggle("match", spans !== undefined);
      if (spans && ranges.length < HIGHLIGHTED_MAX) ranges.push(...rangesOf(text, spans));
    }
    // Browsers without this show the flags alone.
    if ("highlights" in CSS) CSS.highlights.set("match", new Highlight(...ranges));
  }
}

function rowWords(batch: Batch, rate: Rate): string[] {
  const isCounted = rate.total > 0;
  return [
    isCounted ? String(rate.hits) : "–",
    `${batch.finishedCount}${batch.finishedCount < batch.asked ? ` / ${batch.asked}` : ""}`,
    percent(rate.rate),
    isCounted ? `${percent(rate.low)} to ${percent(rate.high)}` : "–",
  ];
}

function rangesOf(text: Text, spans: readonly Span[]): Range[] {
  return spans
    .filter(([, end]) => end <= text.length)
    .map(([start, end]) => {
      const range = new Range();
      range.setStart(text, start);
      range.setEnd(text, end);
      return range;
    });
}
