// Errors of calls in words for people: what happened, what to do, when to try again.

import {
  AccessDenied,
  Aborted,
  CallerLimit,
  ContextExceeded,
  DeadlineExceeded,
  Draining,
  Exhausted,
  InternalServerError,
  LdaClientError,
  Loading,
  NoChatTemplate,
  QueueFull,
  RequestRejected,
  ServerAway,
  SlowConsumer,
  StreamBroken,
  Unavailable,
  WorkerDied,
} from "@lda/client";

export interface Problem {
  title: string;
  text: string;
  /** Seconds after which the server suggests another attempt. */
  retryAfterS: number | undefined;
  /** Whether it is worth watching the server for its return. */
  passes: boolean;
  /** Whether a token would help. */
  needsAccess: boolean;
}

type Kind = abstract new (...parts: never[]) => LdaClientError;

/** From the particular to the general: the first that fits names the problem. */
const TITLES: readonly [Kind, string, string?][] = [
  [ServerAway, "The server does not answer", "This page keeps looking for it, and says when it is back."],
  [Loading, "The models are being loaded", "This page says when they are ready."],
  [Draining, "The server is shutting down", "It finishes what runs and takes nothing new."],
  [WorkerDied, "The models' process has died", "The server is starting a fresh one."],
  [Unavailable, "The server cannot answer now"],
  [QueueFull, "The server is full", "As many requests wait as may wait."],
  [CallerLimit, "Too many requests of yours are open"],
  [SlowConsumer, "This page read too slowly"],
  [Exhausted, "The server ran out of something"],
  [ContextExceeded, "Prompt and answer do not fit the context window"],
  [NoChatTemplate, "This pair has no chat template", "Send raw text instead."],
  [AccessDenied, "The server wants to know who you are", "Give an access token under “Access”."],
  [RequestRejected, "The server refuses this request"],
  [DeadlineExceeded, "It took too long"],
  [Aborted, "The generation was ended on the server"],
  [InternalServerError, "A fault of the server"],
  [StreamBroken, "The stream broke its contract"],
];

/** What to tell about an error. */
export function problemOf(error: unknown): Problem {
  if (!(error instanceof LdaClientError)) return plain("A fault of this page", String(error));
  const [, title, advice] = TITLES.find(([kind]) => error instanceof kind) ?? [LdaClientError, "The call failed"];
  const violations = error.violations.map(({ field, description }) => `${field}: ${description}`);
  // Nobody needs to read what a browser calls a connection that is not there.
  const said = error instanceof ServerAway ? [] : violations.length > 0 ? violations : [error.message];
  return {
    title,
    text: [...said.map(sentence), ...(advice ? [advice] : [])].join(" "),
    retryAfterS: error.retryAfterS,
    passes: error instanceof Unavailable,
    needsAccess: error instanceof AccessDenied,
  };
}

function plain(title: string, text: string): Problem {
  return { title, text: sentence(text), retryAfterS: undefined, passes: false, needsAccess: false };
}

function sentence(text: string): string {
  const trimmed = text.trim();
  return /[.!?]$/.test(trimmed) ? trimmed : `${trimmed}.`;
}
