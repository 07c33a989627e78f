// The line at the top that says which pair is served, and how the server is.

import { byId } from "./dom";
import type { Health, Server } from "./server";

/**
 * Show the server's state. Words change only if the state does: they are read out.
 *
 * @param isAnswering whether a stream of this page is open. A server that shuts down goes on with it, and nobody else
 *   can reach it by then.
 */
export function showHealth({ health, pair }: Server, isAnswering: boolean): void {
  const place = byId("health");
  const kind = health.kind === "away" && isAnswering ? "draining" : health.kind;
  place.dataset.kind = kind;
  const { words, more } = wordsOf(health, kind);
  const text = byId("health-text");
  if (text.textContent !== words) text.textContent = words;
  place.title = more;
  if (pair) {
    byId("pair").textContent = `${pair.after?.modelId} against ${pair.before?.modelId}, ${pair.device}`;
  }
}

function wordsOf(health: Health, kind: Health["kind"]): { words: string; more: string } {
  switch (health.kind) {
    case "unknown":
      return { words: "Looking for the server", more: "" };
    case "ready":
    case "busy": {
      const { runningSequences, maxRunningSequences, waitingRequests } = health.load;
      const more = `${runningSequences} of ${maxRunningSequences} sequences running, ${waitingRequests} requests waiting`;
      return { words: health.kind === "ready" ? "Ready" : "Busy", more };
    }
    case "loading":
    case "draining":
    case "away":
      return { words: NAMES[kind as keyof typeof NAMES], more: `${health.problem.title}. ${health.problem.text}` };
  }
}

const NAMES = { loading: "Loading", draining: "Takes nothing new", away: "Away" };
