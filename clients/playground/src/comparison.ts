// One run of the comparison: the two models and their amplification, on the same noise.

import {
  FinishReason,
  ModelRole,
  type Finished,
  type GenerateEvent,
  type Started,
  type Token,
  type TokenDelta,
} from "@lda/client";
import { divergence, type Divergence } from "./divergence";
import { breathe } from "./frames";
import { PieceDecoder } from "./pieces";
import { amplifiedRequest, bothRequest } from "./requests";
import type { Server } from "./server";
import type { Settings } from "./settings";

export const ROLES = [ModelRole.BEFORE, ModelRole.AFTER, ModelRole.AMPLIFIED] as const;
export type Role = (typeof ROLES)[number];

export const ROLE_NAMES: Record<Role, string> = {
  [ModelRole.BEFORE]: "before",
  [ModelRole.AFTER]: "after",
  [ModelRole.AMPLIFIED]: "amplified",
};

/** What one distribution said. */
export class Sequence {
  readonly tokens: Token[] = [];
  readonly ids: number[] = [];
  /** The characters that each token completes. */
  readonly texts: string[] = [];
  /** The answer, without what a stop string or a special token would add. */
  text = "";
  finished: Finished | undefined;
  private readonly decoder = new PieceDecoder();

  constructor(
    readonly role: Role,
    readonly row: Row,
  ) {}

  add(delta: TokenDelta): void {
    this.text += delta.text;
    for (const token of delta.tokens) {
      this.tokens.push(token);
      this.ids.push(token.id);
      this.texts.push(this.decoder.next(token.piece));
    }
  }
}

/** The three answers with one sequence index. */
export class Row {
  readonly sequences: ReadonlyMap<Role, Sequence>;
  private found: Divergence = { kind: "open", shared: 0 };

  constructor(readonly index: number) {
    this.sequences = new Map(ROLES.map((role) => [role, new Sequence(role, this)]));
  }

  /** Where the three part, as far as is known. */
  get divergence(): Divergence {
    if (this.found?.kind === "open") {
      const tracks = [...this.sequences.values()].map(({ ids, finished }) => ({ ids, ended: finished !== undefined }));
      this.found = divergence(tracks, this.found.shared);
    }
    return this.found;
  }
}

export type Outcome =
  { kind: "running" } | { kind: "done" } | { kind: "cancelled" } | { kind: "failed"; error: unknown };

export interface Listener {
  /** These rows exist now. */
  onRows(rows: readonly Row[]): void;
  onSequence(sequence: Sequence): void;
  onOutcome(): void;
}

/** The two calls of a comparison, and what has come of them. */
export class Comparison {
  readonly rows: Row[] = [];
  outcome: Outcome = { kind: "running" };
  promptTokenCount: number | undefined;
  private readonly leaving = new AbortController();

  constructor(
    private readonly server: Server,
    readonly settings: Readonly<Settings>,
    private readonly listener: Listener,
  ) {}

  /** Read both streams to their ends. Never throws: see `outcome`. */
  async run(): Promise<void> {
    const { client } = this.server;
    const call = { signal: this.leaving.signal };
    try {
      await Promise.all([
        this.read(client.generateBoth(bothRequest(this.settings), call)),
        this.read(client.generate(amplifiedRequest(this.settings), call)),
      ]);
      this.end({ kind: "done" });
    } catch (error) {
      this.end(this.leaving.signal.aborted ? { kind: "cancelled" } : { kind: "failed", error });
    }
  }

  /** Cancel both calls on the server. */
  cancel(): void {
    this.leaving.abort();
  }

  get isRunning(): boolean {
    return this.outcome.kind === "running";
  }

  private end(outcome: Outcome): void {
    this.outcome = outcome;
    // If one call failed, the other is of no use to a comparison.
    this.leaving.abort();
    this.listener.onOutcome();
  }

  private async read(events: AsyncIterable<GenerateEvent>): Promise<void> {
    for await (const { event } of events) {
      if (event.case === "started") this.begin(event.value);
      else if (event.case === "delta") this.sequence(event.value)?.add(event.value);
      else if (event.case === "finished") this.finish(event.value);
      if (event.case === "delta" || event.case === "finished") this.tell(event.value);
      await breathe();
    }
  }

  private begin({ promptTokenCount, sequenceCount, alpha }: Started): void {
    this.promptTokenCount = promptTokenCount;
    // The call that has no alpha brings two answers for each row.
    this.grow(alpha === undefined ? sequenceCount / 2 : sequenceCount);
  }

  private finish(finished: Finished): void {
    const sequence = this.sequence(finished);
    if (sequence) sequence.finished = finished;
  }

  private tell(of: TokenDelta | Finished): void {
    const sequence = this.sequence(of);
    if (sequence) this.listener.onSequence(sequence);
  }

  private sequence({ sequenceIndex, role }: TokenDelta | Finished): Sequence | undefined {
    return this.rows[sequenceIndex]?.sequences.get(role as Role);
  }

  private grow(count: number): void {
    const fresh: Row[] = [];
    for (let index = this.rows.length; index < count; index++) fresh.push(new Row(index));
    this.rows.push(...fresh);
    if (fresh.length > 0) this.listener.onRows(fresh);
  }
}

const REASONS: Record<FinishReason, string> = {
  [FinishReason.UNSPECIFIED]: "ended",
  [FinishReason.EOS]: "ended by itself",
  [FinishReason.STOP]: "stopped",
  [FinishReason.MAX_TOKENS]: "cut at the token limit",
  [FinishReason.CONTEXT_WINDOW]: "filled the context window",
  [FinishReason.TIME_BUDGET]: "out of time",
};

/** Why a sequence ended, in words. */
export function reasonOf(finished: Finished): string {
  const words = REASONS[finished.reason] ?? "ended";
  const { matchedStop } = finished;
  return matchedStop.case === "stopString" ? `${words} at ${JSON.stringify(matchedStop.value)}` : words;
}
