// Runs filters beside the page, which can end this thread if an expression never comes to an end.

import { compile, complaint, spansOf, type Filter, type Span } from "./matching";

export type Question = { kind: "add"; texts: [id: number, text: string][] } | { kind: "forget" } | Ask;
export interface Ask {
  kind: "ask";
  ask: number;
  filter: Filter;
}
export type Answer =
  | { ask: number; found: [id: number, spans: Span[]][] }
  | { ask: number; complaint: string };

const texts = new Map<number, string>();

self.onmessage = ({ data }: MessageEvent<Question>) => {
  if (data.kind === "forget") texts.clear();
  else if (data.kind === "add") for (const [id, text] of data.texts) texts.set(id, text);
  else self.postMessage(answer(data));
};

function answer({ ask, filter }: Ask): Answer {
  try {
    const expression = compile(filter);
    const found = [...texts].map(([id, text]): [number, Span[]] => [id, spansOf(expression, text)]);
    return { ask, found: found.filter(([, spans]) => spans.length > 0) };
  } catch (error) {
    return { ask, complaint: complaint(error) };
  }
}
