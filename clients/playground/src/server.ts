// The server behind this page: its client, and what state it is in, watched gently.

import { Draining, Loading, type GetLoadResponse, type GetModelPairResponse } from "@lda/client";
import { connectWeb } from "@lda/client/web";
import { problemOf, type Problem } from "./problems";

type Client = ReturnType<typeof connectWeb>;

export type Health =
  | { kind: "unknown" }
  | { kind: "ready"; load: GetLoadResponse }
  | { kind: "busy"; load: GetLoadResponse }
  | { kind: "loading" | "draining" | "away"; problem: Problem };

const READY_POLL_MS = 5_000;
const AWAY_POLL_MS = 1_000;
const AWAY_POLL_MAX_MS = 15_000;
const ANSWER_TIMEOUT_MS = 10_000;

/** Knows the client, the pair and the health of the server; tells listeners when either changes. */
export class Server {
  client: Client;
  health: Health = { kind: "unknown" };
  pair: GetModelPairResponse | undefined;
  /** Ids that end an answer. */
  endIds: ReadonlySet<number> = new Set();
  private token: string | undefined;
  private failures = 0;
  private timer: ReturnType<typeof setTimeout> | undefined;
  private isAsking = false;
  private readonly listeners: (() => void)[] = [];

  constructor(readonly origin: string) {
    this.client = connectWeb(origin);
    document.addEventListener("visibilitychange", () => {
      if (document.visibilityState === "visible") this.look();
    });
  }

  onChange(listener: () => void): void {
    this.listeners.push(listener);
  }

  /** Call with this bearer token from now on. */
  identify(token: string): void {
    this.token = token || undefined;
    this.client = connectWeb(this.origin, { token: this.token });
    this.look();
  }

  /** Headers for what is asked as JSON. */
  get headers(): Record<string, string> {
    return this.token === undefined ? {} : { authorization: `Bearer ${this.token}` };
  }

  /** Ask now how the server is, and keep asking. */
  look(): void {
    clearTimeout(this.timer);
    if (!this.isAsking) void this.ask();
  }

  private async ask(): Promise<void> {
    this.isAsking = true;
    try {
      await this.learn();
      this.failures = 0;
    } catch (error) {
      this.failures++;
      this.health = { kind: kindOf(error), problem: problemOf(error) };
    }
    this.isAsking = false;
    for (const listener of this.listeners) listener();
    if (document.visibilityState === "visible") this.timer = setTimeout(() => this.look(), this.pauseMs());
  }

  private async learn(): Promise<void> {
    const options = { timeoutMs: ANSWER_TIMEOUT_MS };
    const load = await this.client.load(options);
    // A server that comes back may hold another pair.
    if (this.pair === undefined || this.failures > 0) {
      const pair = await this.client.modelPair(options);
      const tokenizers = await this.client.tokenizerCompat(options);
      this.pair = pair;
      this.endIds = new Set([...tokenizers.afterEosIds, ...tokenizers.beforeEosIds]);
    }
    this.health = healthOf(load);
  }

  private pauseMs(): number {
    if (this.failures === 0) return READY_POLL_MS;
    return Math.min(AWAY_POLL_MS * 1.5 ** (this.failures - 1), AWAY_POLL_MAX_MS);
  }
}

function healthOf(load: GetLoadResponse): Health {
  if (!load.acceptsWork) return { kind: "draining", problem: problemOf(new Draining("It takes no new work.")) };
  return { kind: load.waitingRequests > 0 ? "busy" : "ready", load };
}

function kindOf(error: unknown): "loading" | "draining" | "away" {
  if (error instanceof Loading) return "loading";
  return error instanceof Draining ? "draining" : "away";
}
