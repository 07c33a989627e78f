// The line at the top that says which pair is served, and how the server is.

import { byId } from "./dom";
import type { Health, Server } from "./server";

/** Show the server's state. Words change only if the state does: they are read out. */
export function showHealth({ health, pair }: Server): void {
  const place = byId("health");
  place.dataset.kind = health.kind;
  const { words, more } = wordsOf(health);
  const text = byId("health-text");
  if (text.textContent !== words) text.textContent = words;
  place.title = more;
  if (pair) {
    byId("pair").textContent = `${pair.after?.modelId} against ${pair.before?.modelId}, ${pair.device}`;
  }
}

function wordsOf(health: Health): { words: string; more: string } {
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
      return { words: NAMES[health.kind], more: `${health.problem.title}. ${health.problem.text}` };
  }
}

const NAMES = { loading: "Loading", draining: "Shutting down", away: "Away" };
