/**
 * One call to the server, tried again while it may be: deadline, cancellation and retries, alike for streams and
 * short calls. Knows nothing of what is in the messages.
 */
import type { CallOptions as ConnectCallOptions } from "@connectrpc/connect";
import { Aborted, DeadlineExceeded, errorFrom, type LdaClientError } from "./errors.js";

const ATTEMPTS_MAX = 4;
const BACKOFF_MS = 100;
const BACKOFF_MAX_MS = 1000;
/** gRPC sends a deadline as eight digits at most. */
const TIMEOUT_MAX_MS = 99_999_999;

/** How one call is made. */
export interface CallOptions {
  /** Deadline in milliseconds, from the beginning of the call to its last message. */
  readonly timeoutMs?: number | undefined;
  /** Ends the call when it is aborted; what waits for the call then fails with `Aborted`. */
  readonly signal?: AbortSignal | undefined;
}

/** What a call needs to know of its client. */
export interface CallContext {
  readonly target: string;
  readonly headers: Readonly<Record<string, string>>;
}

/** Begins one attempt. */
export type Attempt<E> = (options: ConnectCallOptions) => AsyncIterable<E>;

/** A call with its deadline, and the two ways to end it early. */
export class Call<E> {
  readonly #leave = new AbortController();
  readonly #attempt: Attempt<E>;
  readonly #context: CallContext;
  readonly #options: CallOptions;
  #answered = false;
  #deadline = Infinity;

  constructor(attempt: Attempt<E>, context: CallContext, options: CallOptions) {
    checkTimeout(options.timeoutMs);
    this.#attempt = attempt;
    this.#context = context;
    this.#options = options;
  }

  /** Cancel the call on the server, if it is under way. */
  leave(): void {
    this.#leave.abort();
  }

  /** The messages; the call begins when the first is asked for. Throws `LdaClientError`. */
  async *messages(): AsyncGenerator<E, void, undefined> {
    const { signal, timeoutMs } = this.#options;
    const onAbort = () => this.#leave.abort();
    signal?.addEventListener("abort", onAbort);
    if (signal?.aborted) onAbort();
    this.#deadline = timeoutMs === undefined ? Infinity : Date.now() + timeoutMs;
    try {
      yield* this.#attempts();
    } finally {
      signal?.removeEventListener("abort", onAbort);
      this.#leave.abort();
    }
  }

  async *#attempts(): AsyncGenerator<E, void, undefined> {
    for (let failures = 0; ; failures++) {
      try {
        this.#checkOpen();
        yield* this.#once();
        return;
      } catch (thrown) {
        const error = this.#errorFrom(thrown);
        const last = this.#answered || error.code !== "UNAVAILABLE" || failures + 1 >= ATTEMPTS_MAX;
        if (last) throw error;
        await this.#pause(backoffMs(failures));
      }
    }
  }

  async *#once(): AsyncGenerator<E, void, undefined> {
    const messages = this.#attempt(this.#connectOptions())[Symbol.asyncIterator]();
    let handedOut = false;
    try {
      for (let step = await messages.next(); !step.done; step = await messages.next()) {
        handedOut = true;
        yield step.value;
        handedOut = false;
      }
    } finally {
      if (handedOut) {
        this.#leave.abort();
        void drain(messages);
      }
    }
  }

  #connectOptions(): ConnectCallOptions {
    const leftMs = Math.ceil(this.#deadline - Date.now());
    return {
      headers: this.#context.headers,
      signal: this.#leave.signal,
      onHeader: () => {
        this.#answered = true;
      },
      ...(this.#deadline < Infinity && { timeoutMs: Math.max(leftMs, 1) }),
    };
  }

  #errorFrom(thrown: unknown): LdaClientError {
    const error = errorFrom(thrown, this.#context.target, this.#answered);
    if (error.reason === undefined) this.#checkOpen(error);
    return error;
  }

  /** An end of our own making wins over what it looks like on the wire. */
  #checkOpen(cause?: unknown): void {
    const { signal, timeoutMs } = this.#options;
    if (this.#leave.signal.aborted) {
      const message = signal?.aborted ? "The signal of the call was aborted." : "The call was left.";
      throw new Aborted(message, { code: "CANCELLED", cause: signal?.reason ?? cause });
    }
    if (Date.now() >= this.#deadline) {
      throw new DeadlineExceeded(`The call took longer than its deadline of ${timeoutMs} ms; give it a longer one.`, {
        code: "DEADLINE_EXCEEDED",
        cause,
      });
    }
  }

  /** Wait, unless the call is left or out of time before. */
  async #pause(delayMs: number): Promise<void> {
    const { signal } = this.#leave;
    if (signal.aborted) return;
    await new Promise<void>((resolve) => {
      const done = () => {
        clearTimeout(timer);
        signal.removeEventListener("abort", done);
        resolve();
      };
      const timer = setTimeout(done, Math.min(delayMs, this.#deadline - Date.now()));
      signal.addEventListener("abort", done);
    });
  }
}

/**
 * Read on to the error that an aborted call ends with, past what had arrived before. connect-es stops its timer of the
 * deadline only there, and a timer keeps the process from its end.
 */
async function drain(messages: AsyncIterator<unknown>): Promise<void> {
  try {
    while (!(await messages.next()).done);
  } catch {
    // This is the error.
  }
}

/** 0.1 s doubling up to 1 s, spread by a fifth so that callers do not come back together. */
function backoffMs(failures: number): number {
  return Math.min(BACKOFF_MS * 2 ** failures, BACKOFF_MAX_MS) * (0.8 + 0.4 * Math.random());
}

function checkTimeout(timeoutMs: number | undefined): void {
  if (timeoutMs !== undefined && !(timeoutMs > 0 && timeoutMs <= TIMEOUT_MAX_MS)) {
    throw new RangeError(`timeoutMs is ${timeoutMs}; give a number above 0, up to ${TIMEOUT_MAX_MS}, or leave it out.`);
  }
}
