// One token under the glass: how the three distributions see it, and what else could stand there.

import { ModelRole, tokens, type Candidate, type TokenDiagnostics } from "@lda/client";
import { ROLE_NAMES, type Comparison } from "./comparison";
import type { Place } from "./compare_view";
import { alphaText, byId, figure, make } from "./dom";
import { union } from "./candidates";
import { label, tint } from "./pieces";
import { probability } from "./rates";
import { CANDIDATES, promptOf } from "./requests";
import type { Server } from "./server";
import { tintClass } from "./compare_view";

export interface InspectorListener {
  /** Go on from here with this token instead. */
  onFork(place: Place, candidate: { id: number; piece: Uint8Array }): void;
  onClose(): void;
}

type Column = "before" | "after" | "amplified";
const COLUMNS: readonly Column[] = ["before", "after", "amplified"];
const FIELDS = { before: "beforeLogprob", after: "afterLogprob", amplified: "amplifiedLogprob" } as const;

/** A position in the three distributions. */
interface Evidence {
  diagnostics: TokenDiagnostics;
  candidates: Candidate[];
}

export class Inspector {
  private readonly element = byId("inspector");
  private place: Place | undefined;
  private comparison: Comparison | undefined;
  private isPinned = false;
  private sortedBy: Column = "amplified";
  private readonly known = new WeakMap<object, Promise<Evidence>>();

  constructor(
    private readonly server: Server,
    private readonly listener: InspectorListener,
  ) {}

  /** Show a token in passing: what came with it, unless another one is pinned. */
  look(comparison: Comparison, place: Place): void {
    if (this.isPinned) return;
    this.comparison = comparison;
    this.place = place;
    this.show(evidenceAtHand(place), "Choose the token for the three top tens.");
  }

  /** Show a token until another is chosen, with the top of all three distributions. */
  async pin(comparison: Comparison, place: Place): Promise<void> {
    this.comparison = comparison;
    this.place = place;
    this.isPinned = true;
    this.show(evidenceAtHand(place), "Asking for the three top tens …");
    try {
      const evidence = await this.ask(comparison, place);
      if (this.place === place) this.show(evidence, "");
    } catch {
      if (this.place === place)
        this.show(evidenceAtHand(place), "Only what came with the token: the server does not answer.");
    }
  }

  /** Show nothing; whether there was something. */
  close(): boolean {
    const wasOpen = !this.element.hidden;
    this.element.hidden = true;
    this.place = undefined;
    this.isPinned = false;
    if (wasOpen) this.listener.onClose();
    return wasOpen;
  }

  private ask(comparison: Comparison, place: Place): Promise<Evidence> {
    const token = place.sequence.tokens[place.position]!;
    const found = this.known.get(token) ?? this.score(comparison, place);
    this.known.set(token, found);
    found.catch(() => this.known.delete(token));
    return found;
  }

  /** The same position scored as before, after and amplified: each call lists the likeliest tokens of its alpha. */
  private async score(comparison: Comparison, { sequence, position }: Place): Promise<Evidence> {
    const request = {
      prompt: promptOf(comparison.settings),
      continuation: tokens(sequence.ids.slice(0, position + 1)),
      topCandidates: CANDIDATES,
    };
    const at = async (alpha: number) => {
      const scored = await this.server.client.score({ ...request, alpha }).gather();
      return scored.tokens[position]!.diagnostics!;
    };
    const [amplified, after, before] = await Promise.all([at(comparison.settings.alpha), at(0), at(-1)]);
    const others = [...after.candidates, ...before.candidates];
    return { diagnostics: amplified, candidates: union(amplified.candidates, others, comparison.settings.alpha) };
  }

  private show(evidence: Evidence | undefined, note: string): void {
    // Rebuilding takes the focus away from what is replaced.
    const focused = this.element.contains(document.activeElement) ? document.activeElement?.id : undefined;
    this.element.hidden = false;
    this.element.classList.toggle("pinned", this.isPinned);
    const table = evidence && this.table(evidence, note);
    this.element.replaceChildren(this.facts(evidence?.diagnostics), ...(table ? [table] : []), this.closeButton());
    if (focused) document.getElementById(focused)?.focus();
  }

  private closeButton(): HTMLElement {
    const on = { click: () => this.close() };
    return make("button", {
      type: "button",
      id: "close-token",
      class: "quiet",
      "aria-label": "Close the token",
      text: "×",
      on,
    });
  }

  private facts(diagnostics: TokenDiagnostics | undefined): HTMLElement {
    const { sequence, position } = this.place!;
    const token = sequence.tokens[position]!;
    const where = `${ROLE_NAMES[sequence.role]}, sequence ${sequence.row.index + 1}, token ${position + 1}`;
    const shade = diagnostics ? tintClass(tint(diagnostics.afterLogprob, diagnostics.beforeLogprob)) : "";
    return make(
      "div",
      { class: "facts", "aria-live": "polite" },
      make("h3", {}, make("span", { class: `glass ${shade}`, text: label(token.piece) })),
      make("p", { class: "note", text: `${where} · id ${token.id}` }),
      diagnostics ? make("dl", {}, ...facts(diagnostics).flatMap(([name, value]) => fact(name, value))) : undefined,
    );
  }

  private table({ diagnostics, candidates }: Evidence, note: string): HTMLElement {
    const { sequence, position } = this.place!;
    const field = FIELDS[this.sortedBy];
    const sorted = [...candidates].sort((a, b) => (b[field] ?? -Infinity) - (a[field] ?? -Infinity));
    const heads = COLUMNS.map((column) => this.head(column));
    const rows = sorted.map((candidate) => this.row(candidate, candidate.id === sequence.tokens[position]!.id));
    return make(
      "div",
      { class: "candidates" },
      make(
        "table",
        {},
        make("caption", { class: "offscreen", text: "Candidates at this position" }),
        make("thead", {}, make("tr", {}, make("th", { scope: "col", text: "Candidate" }), ...heads, make("th"))),
        make("tbody", {}, ...rows),
      ),
      make("p", { class: "note", text: note || criticalWords(diagnostics) }),
    );
  }

  private head(column: Column): HTMLElement {
    const isSorted = column === this.sortedBy;
    const sort = () => {
      this.sortedBy = column;
      void (this.isPinned ? this.pin(this.comparison!, this.place!) : this.look(this.comparison!, this.place!));
    };
    const title = column === "amplified" ? `amplified, α = ${alphaText(this.comparison!.settings.alpha)}` : column;
    const button = make("button", {
      type: "button",
      id: `sort-${column}`,
      class: "quiet",
      text: title,
      on: { click: sort },
    });
    return make("th", { scope: "col", "aria-sort": isSorted ? "descending" : "none" }, button);
  }

  private row(candidate: Candidate, isHere: boolean): HTMLElement {
    const name = label(candidate.piece);
    const cells = COLUMNS.map((column) => probabilityCell(column, candidate[FIELDS[column]]));
    const isEnd = this.server.endIds.has(candidate.id);
    const action = isHere ? "here" : isEnd ? "ends" : this.forkButton(candidate, name);
    return make(
      "tr",
      { class: isHere ? "here" : "" },
      make("th", { scope: "row" }, make("code", { text: name })),
      ...cells,
      make("td", { class: "act" }, action),
    );
  }

  private forkButton(candidate: Candidate, name: string): HTMLElement {
    const place = this.place!;
    const on = { click: () => this.listener.onFork(place, candidate) };
    return make("button", { type: "button", class: "fork", "aria-label": `Fork with ${name}`, text: "Fork", on });
  }
}

/** What came with the token itself: its own column's top ten. Only the amplified column knows the alpha in use. */
function evidenceAtHand({ sequence, position }: Place): Evidence | undefined {
  const { diagnostics } = sequence.tokens[position]!;
  if (!diagnostics || sequence.role === ModelRole.AMPLIFIED) {
    return diagnostics && { diagnostics, candidates: diagnostics.candidates };
  }
  const candidates = diagnostics.candidates.map((each) => ({ ...each, amplifiedLogprob: undefined }));
  return { diagnostics: { ...diagnostics, amplifiedLogprob: undefined, amplifiedRank: 0 }, candidates };
}

function facts(diagnostics: TokenDiagnostics): [string, string][] {
  const { afterLogprob, beforeLogprob, amplifiedLogprob } = diagnostics;
  const moved = afterLogprob === undefined || beforeLogprob === undefined ? undefined : afterLogprob - beforeLogprob;
  return [
    ["log p before", figure(beforeLogprob, 3)],
    ["log p after", figure(afterLogprob, 3)],
    ["log p amplified", figure(amplifiedLogprob, 3)],
    ["after − before", `${moved !== undefined && moved > 0 ? "+" : ""}${figure(moved, 3)} nats`],
    ["rank", `${diagnostics.beforeRank} → ${diagnostics.afterRank} → ${diagnostics.amplifiedRank || "…"}`],
    ["KL(after ‖ before)", `${figure(diagnostics.afterBeforeKl, 3)} nats`],
    ["novel mass", probability(diagnostics.novelMass)],
    ["critical α", diagnostics.criticalAlpha === undefined ? "none" : figure(diagnostics.criticalAlpha)],
  ];
}

function fact(name: string, value: string): HTMLElement[] {
  return [make("dt", { text: name }), make("dd", { text: value })];
}

function criticalWords({ criticalAlpha, criticalPiece }: TokenDiagnostics): string {
  if (criticalAlpha === undefined) return "No α above 0 overtakes the after model’s first choice here.";
  return `At α = ${figure(criticalAlpha)}, “${label(criticalPiece)}” overtakes the after model’s first choice.`;
}

function probabilityCell(column: Column, logprob: number | undefined): HTMLElement {
  if (logprob === undefined) return make("td", { class: "p", title: "not in this top ten" }, "·");
  const share = Math.exp(logprob);
  const bar = make("i", { class: column, "aria-hidden": "true" });
  bar.style.setProperty("--share", String(share));
  return make("td", { class: "p" }, bar, make("span", { text: probability(share) }));
}
