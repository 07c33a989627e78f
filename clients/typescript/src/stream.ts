/**
 * Streams of events: iterate them, leave them early, or gather them whole.
 *
 *     for await (const event of client.generate(request)) { ... }
 *
 * A stream begins when its first event is asked for. Leaving the loop, by `break`, `return` or an error, cancels the
 * call on the server, which frees its place at the next decoding step; so does `close()` from elsewhere.
 */
import type { Call } from "./call.js";
import type { Completion, GenerateEvent, GenerateReader, Reader, ScoredText } from "./gather.js";
import type { ModelRole, ScoreResponse, Started } from "./gen/lda/v1/lda_service_pb.js";

/** Text of one sequence as it arrived: whole characters, never empty. */
export interface TextPiece {
  readonly sequenceIndex: number;
  readonly role: ModelRole;
  readonly text: string;
}

/** The events of one call. Errors of the call are thrown by iteration, as an `LdaClientError`. */
export abstract class EventStream<E, R> implements AsyncIterableIterator<E, void, undefined>, AsyncDisposable {
  readonly #call: Call<E>;
  readonly #reader: Reader<E, R>;
  readonly #events: AsyncGenerator<E, void, undefined>;
  #begun = false;
  #closed = false;

  constructor(call: Call<E>, reader: Reader<E, R>) {
    this.#call = call;
    this.#reader = reader;
    this.#events = this.#read();
  }

  /** The next event. */
  next(): Promise<IteratorResult<E, void>> {
    this.#begun = true;
    return this.#events.next();
  }

  /** Called when a loop is left; the same as `close()`. */
  async return(): Promise<IteratorResult<E, void>> {
    this.#closed = true;
    this.#call.leave();
    return this.#events.return();
  }

  /** Cancel the call on the server if it is still under way; iteration then simply ends. May be called twice. */
  async close(): Promise<void> {
    await this.return();
  }

  [Symbol.asyncIterator](): this {
    return this;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }

  /**
   * Read the stream to its end and return what it adds up to.
   *
   * @throws LdaClientError if the call fails; `StreamBroken` if it was closed before its end.
   */
  async gather(): Promise<R> {
    if (this.#begun) throw new TypeError("gather() needs the whole stream, but events were already read from it.");
    for await (const event of this) this.#reader.add(event);
    this.#reader.end();
    return this.#reader.result();
  }

  async *#read(): AsyncGenerator<E, void, undefined> {
    try {
      for await (const event of this.#call.messages()) {
        if (this.#reader.observe(event)) yield event;
      }
      this.#reader.end();
    } catch (error) {
      if (!this.#closed) throw error;
    }
  }
}

/** The events of `generate` or `generateBoth`. */
export class GenerateStream<E extends GenerateEvent> extends EventStream<E, Completion[]> {
  readonly #reader: GenerateReader<E>;

  constructor(call: Call<E>, reader: GenerateReader<E>) {
    super(call, reader);
    this.#reader = reader;
  }

  /** The first event: generation id, seed and alpha in force; undefined until it has arrived. */
  get started(): Started | undefined {
    return this.#reader.started;
  }

  /** The texts alone, in the order of arrival. */
  async *text(): AsyncGenerator<TextPiece, void, undefined> {
    for await (const { event } of this) {
      if (event.case !== "delta" || event.value.text === "") continue;
      const { sequenceIndex, role, text } = event.value;
      yield { sequenceIndex, role, text };
    }
  }
}

/** The blocks of `score`. */
export class ScoreStream extends EventStream<ScoreResponse, ScoredText> {}
