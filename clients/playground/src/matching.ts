// What the filter finds in a completion. Pure, so that the worker and the tests share it.

import type { FilterKind } from "./settings";

export interface Filter {
  pattern: string;
  kind: FilterKind;
  matchCase: boolean;
}

/** Begin and end of a match in a text, in UTF-16 units. */
export type Span = [number, number];

const SPANS_MAX = 50;

/** The filter as a regular expression; throws SyntaxError if a person's own one is none. */
export function compile({ pattern, kind, matchCase }: Filter): RegExp {
  const source = kind === "regex" ? pattern : pattern.replace(/[\\^$.*+?()[\]{}|/]/g, "\\$&");
  return new RegExp(source, `gu${matchCase ? "" : "i"}`);
}

/** All matches, an empty one too; empty if there are none. */
export function spansOf(expression: RegExp, text: string): Span[] {
  const spans: Span[] = [];
  for (const match of text.matchAll(expression)) {
    spans.push([match.index, match.index + match[0].length]);
    if (spans.length === SPANS_MAX) break;
  }
  return spans;
}

/** Why an expression is none, in one sentence. */
export function complaint(error: unknown): string {
  const reason = error instanceof Error ? error.message.replace(/^Invalid regular expression: /, "") : String(error);
  return `This is no regular expression: ${reason.replace(/^\/.*\/\w*: /s, "")}.`;
}
