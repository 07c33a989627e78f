/**
 * The grammar of the streams, and what a whole stream adds up to.
 *
 *     generate        started (delta)* finished{sequence_count}, then OK
 *     score           blocks that follow on one another up to the announced total, then OK
 *
 * Knows events only: nothing of calls.
 */
import { StreamBroken } from "./errors.js";
import type {
  AlphaScore,
  Finished,
  FinishReason,
  GenerateBothResponse,
  GenerateLDAResponse,
  ModelRole,
  ScoreResponse,
  Started,
  Token,
  TokenDelta,
  Usage,
} from "./gen/lda/v1/lda_service_pb.js";

export type GenerateEvent = GenerateLDAResponse | GenerateBothResponse;

/** One finished sequence. */
export interface Completion {
  /** Counts from 0, for each role on its own. */
  readonly sequenceIndex: number;
  /** Which distribution drew it. */
  readonly role: ModelRole;
  /** Its text, without the stop string. */
  readonly text: string;
  /** Its tokens, with log-probabilities and diagnostics as asked for. */
  readonly tokens: readonly Token[];
  /** Why it ended. */
  readonly reason: FinishReason;
  /** The stop string or stop token that matched; undefined if none did. */
  readonly matchedStop: string | number | undefined;
  /** log q_alpha of the whole sequence in nats, for each of `scoreAlphas` as the caller wrote it. */
  readonly alphaScores: ReadonlyMap<number, number>;
  /** What it cost. */
  readonly usage: Usage | undefined;
  /** The seed in force for the whole generation. */
  readonly seed: bigint;
}

/** A continuation scored at every position. */
export interface ScoredText {
  /** Its tokens, each with diagnostics. */
  readonly tokens: readonly Token[];
  /** log q_alpha of the whole continuation in nats, for each of `scoreAlphas` as the caller wrote it. */
  readonly alphaScores: ReadonlyMap<number, number>;
}

/** Follows a stream event by event, and adds up what is given to `add`. */
export interface Reader<E, R> {
  /** Check one event against the grammar; whether it is of a kind that we know. Throws `StreamBroken`. */
  observe(event: E): boolean;
  /** Check that the stream may end here with OK. Throws `StreamBroken`. */
  end(): void;
  /** Keep what this event brings. */
  add(event: E): void;
  /** What the kept events come to. */
  result(): R;
}

interface Sequence {
  readonly texts: string[];
  readonly tokens: Token[];
}

/** Reads `generate` and `generateBoth`; sequences may come interleaved. */
export class GenerateReader<E extends GenerateEvent> implements Reader<E, Completion[]> {
  started: Started | undefined;
  readonly #finished = new Set<string>();
  readonly #running = new Map<string, Sequence>();
  readonly #completions: Completion[] = [];
  readonly #roles: number;
  readonly #scoreAlphas: readonly number[];

  /** @param roles how many models draw: the announced sequences are shared out among them. */
  constructor(roles: number, scoreAlphas: readonly number[] = []) {
    this.#roles = roles;
    this.#scoreAlphas = scoreAlphas;
  }

  observe({ event }: E): boolean {
    switch (event.case) {
      case "started":
        check(this.started === undefined, "it sent `started` twice");
        this.started = event.value;
        return true;
      case "delta":
        this.#checkRunning(event.value);
        return true;
      case "finished":
        this.#checkRunning(event.value);
        this.#finished.add(key(event.value));
        return true;
      default:
        return false;
    }
  }

  end(): void {
    check(this.started !== undefined, "it ended before `started`");
    const { sequenceCount } = this.started;
    const { size } = this.#finished;
    check(size === sequenceCount, `it ended when ${size} of ${sequenceCount} sequences had finished`);
  }

  add({ event }: E): void {
    if (event.case === "delta") {
      const { texts, tokens } = this.#sequence(event.value);
      texts.push(event.value.text);
      tokens.push(...event.value.tokens);
    } else if (event.case === "finished") {
      this.#completions.push(this.#completion(event.value));
    }
  }

  result(): Completion[] {
    return this.#completions;
  }

  #checkRunning(event: TokenDelta | Finished): void {
    check(this.started !== undefined, "it did not begin with `started`");
    const { sequenceIndex } = event;
    check(sequenceIndex < this.started.sequenceCount / this.#roles, `sequence ${sequenceIndex} was never announced`);
    check(!this.#finished.has(key(event)), `sequence ${sequenceIndex} went on after it had finished`);
  }

  #sequence(event: TokenDelta | Finished): Sequence {
    const found = this.#running.get(key(event)) ?? { texts: [], tokens: [] };
    this.#running.set(key(event), found);
    return found;
  }

  #completion(finished: Finished): Completion {
    const { texts, tokens } = this.#sequence(finished);
    return {
      sequenceIndex: finished.sequenceIndex,
      role: finished.role,
      text: texts.join(""),
      tokens,
      reason: finished.reason,
      matchedStop: finished.matchedStop.value,
      alphaScores: alphaScores(finished.alphaScores, this.#scoreAlphas),
      usage: finished.usage,
      seed: this.started?.seed ?? 0n,
    };
  }
}

/** Reads `score`: blocks without gaps, up to the total that each of them announces. */
export class ScoreReader implements Reader<ScoreResponse, ScoredText> {
  #begun = false;
  #scored = 0;
  #total = 0;
  readonly #tokens: Token[] = [];
  readonly #scores: AlphaScore[] = [];
  readonly #scoreAlphas: readonly number[];

  constructor(scoreAlphas: readonly number[] = []) {
    this.#scoreAlphas = scoreAlphas;
  }

  observe(block: ScoreResponse): boolean {
    check(block.offset === this.#scored, `a block begins at token ${block.offset}, not at ${this.#scored}`);
    this.#begun = true;
    this.#scored += block.tokens.length;
    this.#total = block.totalTokenCount;
    return true;
  }

  end(): void {
    check(this.#begun, "it ended before its first block");
    check(this.#scored === this.#total, `it ended when ${this.#scored} of ${this.#total} tokens were scored`);
  }

  add(block: ScoreResponse): void {
    this.#tokens.push(...block.tokens);
    this.#scores.push(...block.alphaScores);
  }

  result(): ScoredText {
    return { tokens: this.#tokens, alphaScores: alphaScores(this.#scores, this.#scoreAlphas) };
  }
}

function key(event: TokenDelta | Finished): string {
  return `${event.role}/${event.sequenceIndex}`;
}

function check(holds: boolean, finding: string): asserts holds {
  if (!holds) {
    throw new StreamBroken(
      `The stream broke its contract: ${finding}. Server and client may be of different versions.`,
    );
  }
}

/** Log-probabilities by alpha. The wire rounds alphas to 32 bits; the keys are the caller's own numbers. */
function alphaScores(scores: readonly AlphaScore[], asked: readonly number[]): Map<number, number> {
  const named = asked.length === scores.length;
  return new Map(scores.map((score, index) => [named ? (asked[index] ?? score.alpha) : score.alpha, score.logprob]));
}
