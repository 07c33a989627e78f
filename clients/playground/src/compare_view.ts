// The three columns. Tokens are only ever appended, and only once per frame.

import { alphaText, byId, figure, make } from "./dom";
import { ROLE_NAMES, ROLES, reasonOf, type Comparison, type Role, type Row, type Sequence } from "./comparison";
import { perFrame } from "./frames";
import { label, tint, TINT_STEPS } from "./pieces";

/** A token on the page. */
export interface Place {
  sequence: Sequence;
  position: number;
}

export interface CompareListener {
  /** The pointer or the keyboard is at this token; nothing if it left. */
  onLook(place: Place): void;
  /** This token was chosen. */
  onChoose(place: Place): void;
}

// What a frame does not come to is done in the next.
const FRAME_BUDGET_MS = 6;
const TOKENS_AT_ONCE = 64;
// Laying out and painting cost more than appending: many answers grow in larger steps.
const MANY_CELLS = 12;
const MANY_PAUSE_MS = 120;
const PARTED = "parted";

const tokenTemplate = make("span", { class: "t", role: "option" });

/** The element of one answer, and how far it shows its sequence. */
interface Cell {
  sequence: Sequence;
  element: HTMLElement;
  end: HTMLElement;
  shown: number;
  isEnded: boolean;
}

export class CompareView {
  private readonly rows = byId("rows");
  private readonly cells = new Map<Sequence, Cell>();
  private readonly cellsByList = new Map<Element, Cell>();
  private readonly notes = new Map<Row, HTMLElement>();
  private readonly dirty = new Set<Cell>();
  private readonly flushSoon = perFrame(() => this.draw());
  private readonly flushLater = perFrame(() => this.draw(), MANY_PAUSE_MS);
  private active: HTMLElement | undefined;
  private chosen: HTMLElement | undefined;
  private comparison: Comparison | undefined;

  constructor(
    private readonly listener: CompareListener,
    private readonly isEnd: (id: number) => boolean,
  ) {
    for (let step = -TINT_STEPS; step <= TINT_STEPS; step++)
      byId("legend-scale").append(make("i", { class: tintClass(step) }));
    this.rows.addEventListener("pointerover", (event) => this.at(event.target, (place) => this.listener.onLook(place)));
    this.rows.addEventListener("click", (event) => this.at(event.target, (place) => this.choose(place)));
    this.rows.addEventListener("keydown", (event) => this.move(event));
    this.rows.addEventListener("focusin", (event) => this.enter(event));
  }

  /** Show this run, from its beginning. */
  show(comparison: Comparison): void {
    this.comparison = comparison;
    this.rows.replaceChildren();
    this.cells.clear();
    this.cellsByList.clear();
    this.notes.clear();
    this.dirty.clear();
    this.active = this.chosen = undefined;
    byId("head-alpha").textContent = `α = ${alphaText(comparison.settings.alpha)}`;
    this.add(comparison.rows);
    if (!comparison.isRunning) this.settle();
  }

  /** These rows are new. */
  add(rows: readonly Row[]): void {
    for (const row of rows) {
      this.rows.append(this.row(row));
      for (const sequence of row.sequences.values()) this.update(sequence);
    }
  }

  /** There is more of this sequence. */
  update(sequence: Sequence): void {
    const cell = this.cells.get(sequence);
    if (!cell) return;
    this.dirty.add(cell);
    this.flush();
  }

  /** The run has ended: what has not finished will not. */
  settle(): void {
    for (const { sequence, element } of this.cells.values()) {
      if (!sequence.finished) element.closest(".cell")!.classList.remove("open");
    }
  }

  /** Nothing is chosen any more. */
  release(): void {
    this.chosen?.setAttribute("aria-selected", "false");
    this.chosen = undefined;
  }

  private row(row: Row): HTMLElement {
    const note = make("span", { class: "note" });
    const head = make("div", { class: "row-head" }, make("h3", { text: `Sequence ${row.index + 1}` }), note);
    this.notes.set(row, note);
    return make("div", { class: "row" }, head, ...ROLES.map((role) => this.cell(row.sequences.get(role)!)));
  }

  private cell(sequence: Sequence): HTMLElement {
    const kept = this.comparison!.settings.fork?.kept;
    const name = `${ROLE_NAMES[sequence.role]}, sequence ${sequence.row.index + 1}`;
    const element = make("div", { class: "tokens", role: "listbox", tabindex: "0", "aria-label": `Tokens: ${name}` });
    const end = make("div", { class: "end" });
    const title = make("div", { class: "cell-title", text: ROLE_NAMES[sequence.role] });
    const inherited = kept !== undefined && make("span", { class: "kept", text: kept });
    const cell = { sequence, element, end, shown: 0, isEnded: false };
    this.cells.set(sequence, cell);
    this.cellsByList.set(element, cell);
    const body = make("div", { class: "answer" }, inherited, element);
    return make("div", { class: `cell ${ROLE_NAMES[sequence.role]} open` }, title, body, end);
  }

  private draw(): void {
    const endsAt = performance.now() + FRAME_BUDGET_MS;
    const rows = new Set<Row>();
    for (const cell of this.dirty) {
      while (cell.shown < cell.sequence.tokens.length && performance.now() < endsAt) this.append(cell);
      rows.add(cell.sequence.row);
      if (cell.shown < cell.sequence.tokens.length) break;
      if (cell.sequence.finished && !cell.isEnded) this.finish(cell);
      this.dirty.delete(cell);
    }
    for (const row of rows) this.mark(row);
    if (this.dirty.size > 0) this.flush();
  }

  private flush(): void {
    if (this.cells.size > MANY_CELLS) this.flushLater();
    else this.flushSoon();
  }

  private append(cell: Cell): void {
    const { sequence } = cell;
    const to = Math.min(sequence.tokens.length, cell.shown + TOKENS_AT_ONCE);
    const fragment = document.createDocumentFragment();
    for (let position = cell.shown; position < to; position++) fragment.append(this.token(sequence, position));
    cell.element.append(fragment);
    cell.shown = to;
  }

  private token(sequence: Sequence, position: number): HTMLElement {
    const { id, piece, diagnostics } = sequence.tokens[position]!;
    const element = tokenTemplate.cloneNode(false) as HTMLElement;
    const text = sequence.texts[position]!;
    const step = tint(diagnostics?.afterLogprob, diagnostics?.beforeLogprob);
    if (step !== 0) element.classList.add(tintClass(step));
    if (this.isEnd(id)) element.classList.add("special");
    else if (text === "") element.classList.add("part");
    else if (text.includes("\n")) element.classList.add("line");
    element.textContent = this.isEnd(id) ? label(piece) : text;
    return element;
  }

  private finish(cell: Cell): void {
    const { sequence, element, end } = cell;
    cell.isEnded = true;
    end.textContent = `${reasonOf(sequence.finished!)} · ${sequence.tokens.length} tokens · ${meanKl(sequence)}`;
    element.closest(".cell")!.classList.remove("open");
    if (sequence.finished!.matchedStop.case === "stopString") this.cut(cell);
  }

  /** Tokens that a stop string took away are no part of the answer. */
  private cut({ sequence, element }: Cell): void {
    let length = 0;
    for (const [position, text] of sequence.texts.entries()) {
      length += text.length;
      if (length > sequence.text.length) element.children[position]!.classList.add("cut");
    }
  }

  /** Say and mark where the three answers of a row part. */
  private mark(row: Row): void {
    const found = row.divergence;
    const note = this.notes.get(row)!;
    const words = divergenceWords(row);
    if (note.textContent !== words) note.textContent = words;
    const at = found.kind === "parted" ? found.at : undefined;
    if (at === undefined) return;
    for (const sequence of row.sequences.values()) {
      const { element, end, isEnded } = this.cells.get(sequence)!;
      element.children[at]?.classList.add(PARTED);
      end.classList.toggle(PARTED, isEnded && sequence.tokens.length <= at);
    }
  }

  private at(target: EventTarget | null, act: (place: Place, element: HTMLElement) => void): void {
    const element = (target as Element | null)?.closest?.<HTMLElement>(".t");
    const place = element && this.placeOf(element);
    if (place) act(place, element);
  }

  private placeOf(element: HTMLElement): Place | undefined {
    const list = element.parentElement!;
    const cell = this.cellsByList.get(list);
    if (!cell) return undefined;
    return { sequence: cell.sequence, position: Array.prototype.indexOf.call(list.children, element) };
  }

  private elementOf({ sequence, position }: Place): HTMLElement | undefined {
    return this.cells.get(sequence)?.element.children[position] as HTMLElement | undefined;
  }

  private choose(place: Place): void {
    this.release();
    this.activate(place);
    this.chosen = this.elementOf(place);
    this.chosen?.setAttribute("aria-selected", "true");
    this.listener.onChoose(place);
  }

  private activate(place: Place): void {
    const element = this.elementOf(place);
    if (!element) return;
    if (this.active) {
      this.active.removeAttribute("id");
      this.active.parentElement!.removeAttribute("aria-activedescendant");
    }
    this.active = element;
    element.id = "active-token";
    const list = element.parentElement!;
    list.setAttribute("aria-activedescendant", element.id);
    if (document.activeElement !== list) list.focus({ preventScroll: true });
    element.scrollIntoView({ block: "nearest" });
    this.listener.onLook(place);
  }

  private enter(event: FocusEvent): void {
    const list = event.target as HTMLElement;
    if (!list.classList.contains("tokens") || this.active?.parentElement === list) return;
    const first = list.children[0] as HTMLElement | undefined;
    const place = first && this.placeOf(first);
    if (place) this.activate(place);
  }

  private move(event: KeyboardEvent): void {
    if (!this.active || event.altKey || event.ctrlKey || event.metaKey) return;
    const from = this.placeOf(this.active)!;
    const to = this.target(event.key, from);
    if (event.key === "Enter" || event.key === " ") this.choose(from);
    else if (to) this.activate(to);
    else return;
    event.preventDefault();
  }

  private target(key: string, { sequence, position }: Place): Place | undefined {
    const last = sequence.tokens.length - 1;
    const steps: Record<string, number> = { ArrowLeft: position - 1, ArrowRight: position + 1, Home: 0, End: last };
    if (key in steps) return { sequence, position: clamp(steps[key]!, last) };
    const sideways = { ArrowUp: -1, ArrowDown: 1 }[key];
    const role = sideways && ROLES[ROLES.indexOf(sequence.role) + sideways];
    const beside = role && sequence.row.sequences.get(role as Role);
    return beside ? { sequence: beside, position: clamp(position, beside.tokens.length - 1) } : undefined;
  }
}

function clamp(position: number, last: number): number {
  return Math.max(0, Math.min(position, last));
}

export function tintClass(step: number): string {
  return step < 0 ? `b${-step}` : `a${step}`;
}

function divergenceWords(row: Row): string {
  const found = row.divergence;
  if (found.kind === "same") return "All three say the same.";
  if (found.kind === "open") return found.shared > 0 ? `The same for ${found.shared} tokens so far.` : "";
  const said = [...row.sequences.values()].map((sequence) => {
    const token = sequence.tokens[found.at];
    return `${ROLE_NAMES[sequence.role]} “${token ? label(token.piece) : "end"}”`;
  });
  const shared = found.at === 0 ? "They part at the first token" : `The same for ${found.at} tokens, then`;
  return `${shared}: ${said.join(", ")}.`;
}

function meanKl(sequence: Sequence): string {
  const known = sequence.tokens.flatMap((token) => (token.diagnostics ? [token.diagnostics.afterBeforeKl] : []));
  if (known.length === 0) return "";
  return `mean KL ${figure(known.reduce((sum, kl) => sum + kl, 0) / known.length, 3)}`;
}
