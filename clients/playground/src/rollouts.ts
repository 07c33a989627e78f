// Many completions at each of several alphas.

import type { Finished, GenerateEvent } from "@lda/client";
import type { Outcome } from "./comparison";
import { breathe } from "./frames";
import { rolloutsRequest } from "./requests";
import type { Server } from "./server";
import type { Settings } from "./settings";

// Browsers open six connections to a server that speaks HTTP/1.1: some must be left for everything else.
const CALLS_MAX = 3;

export class Rollout {
  text = "";
  finished: Finished | undefined;
  /** Set by whoever looks for matches. */
  number: number | undefined;

  constructor(
    readonly batch: Batch,
    readonly index: number,
  ) {}
}

/** The completions at one alpha. */
export class Batch {
  readonly rollouts: Rollout[] = [];
  finishedCount = 0;
  state: "waiting" | "running" | "ended" = "waiting";

  constructor(
    readonly alpha: number,
    readonly asked: number,
  ) {}

  rollout(index: number): Rollout {
    while (this.rollouts.length <= index) this.rollouts.push(new Rollout(this, this.rollouts.length));
    return this.rollouts[index]!;
  }
}

export interface RolloutsListener {
  onText(rollout: Rollout, text: string): void;
  onFinished(rollout: Rollout): void;
  onBatch(batch: Batch): void;
  onOutcome(): void;
}

/** The calls of a run, a few at a time, and what has come of them. */
export class RolloutsRun {
  readonly batches: Batch[];
  outcome: Outcome = { kind: "running" };
  private readonly leaving = new AbortController();

  constructor(
    private readonly server: Server,
    readonly settings: Readonly<Settings>,
    private readonly listener: RolloutsListener,
  ) {
    const asked = rolloutsRequest(settings, 0).numSequences ?? 1;
    this.batches = settings.alphas.map((alpha) => new Batch(alpha, asked));
  }

  get isRunning(): boolean {
    return this.outcome.kind === "running";
  }

  /** Draw everything. Never throws: see `outcome`. */
  async run(): Promise<void> {
    const waiting = [...this.batches];
    const lane = async () => {
      for (let batch = waiting.shift(); batch; batch = waiting.shift()) await this.draw(batch);
    };
    try {
      await Promise.all(Array.from({ length: CALLS_MAX }, lane));
      this.end({ kind: "done" });
    } catch (error) {
      this.end(this.leaving.signal.aborted ? { kind: "cancelled" } : { kind: "failed", error });
    }
  }

  /** Cancel all calls on the server. */
  cancel(): void {
    this.leaving.abort();
  }

  private end(outcome: Outcome): void {
    this.outcome = outcome;
    this.leaving.abort();
    this.listener.onOutcome();
  }

  private async draw(batch: Batch): Promise<void> {
    this.become(batch, "running");
    const call = { signal: this.leaving.signal };
    const events = this.server.client.generate(rolloutsRequest(this.settings, batch.alpha), call);
    try {
      for await (const { event } of events) {
        this.take(batch, event);
        await breathe();
      }
    } finally {
      this.become(batch, "ended");
    }
  }

  private become(batch: Batch, state: Batch["state"]): void {
    batch.state = state;
    this.listener.onBatch(batch);
  }

  private take(batch: Batch, event: GenerateEvent["event"]): void {
    if (event.case === "delta" && event.value.text !== "") {
      const rollout = batch.rollout(event.value.sequenceIndex);
      rollout.text += event.value.text;
      this.listener.onText(rollout, event.value.text);
    } else if (event.case === "finished") {
      const rollout = batch.rollout(event.value.sequenceIndex);
      rollout.finished = event.value;
      batch.finishedCount++;
      this.listener.onFinished(rollout);
    }
  }
}
