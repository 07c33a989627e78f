// Runs filters beside the page, which can end this thread if an expression never comes to an end.

import { compile, complaint, spansOf, type Filter, type Span } from "./matching";

export type Question =
  { kind: "add"; texts: string[] } | { kind: "forget" } | { kind: "ask"; ask: number; filter: Filter; from: number };

/** `begun` comes before the work, so that only the work is timed. */
export type Answer =
  | { kind: "begun"; ask: number }
  | { kind: "found"; ask: number; found: [index: number, spans: Span[]][]; to: number }
  | { kind: "complaint"; ask: number; complaint: string };

let texts: string[] = [];

self.onmessage = ({ data }: MessageEvent<Question>) => {
  if (data.kind === "forget") texts = [];
  else if (data.kind === "add") texts.push(...data.texts);
  else {
    self.postMessage({ kind: "begun", ask: data.ask } satisfies Answer);
    self.postMessage(search(data.ask, data.filter, data.from));
  }
};

function search(ask: number, filter: Filter, from: number): Answer {
  try {
    const expression = compile(filter);
    const found = texts.slice(from).map((text, index): [number, Span[]] => [from + index, spansOf(expression, text)]);
    return { kind: "found", ask, found: found.filter(([, spans]) => spans.length > 0), to: texts.length };
  } catch (error) {
    return { kind: "complaint", ask, complaint: complaint(error) };
  }
}
