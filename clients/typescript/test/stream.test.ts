import assert from "node:assert/strict";
import { test } from "node:test";
import {
  Aborted,
  DeadlineExceeded,
  FinishReason,
  GenerateLDAResponseSchema,
  ModelRole,
  ScoreResponseSchema,
  StreamBroken,
} from "@lda/client";
import { create } from "@bufbuild/protobuf";
import {
  clientOf,
  delta,
  errorOf,
  type EventInit,
  finished,
  holdUntilCancelled,
  latch,
  plays,
  REQUEST,
  started,
} from "./harness.js";

const utf8 = new TextEncoder();

test("text arrives in order, in whole characters; pieces are bytes and may be half of one", async (t) => {
  const smile = utf8.encode("🙂");
  const halves = [smile.slice(0, 2), smile.slice(2)];
  const events = [started(), delta("héllo "), delta("🙂", 0, halves), delta(""), finished()];
  const client = await clientOf(t, { generateLDA: plays(events) });
  const texts: string[] = [];
  for await (const piece of client.generate(REQUEST).text()) texts.push(piece.text);
  assert.deepEqual(texts, ["héllo ", "🙂"]);
  const [completion] = await client.complete(REQUEST);
  assert.equal(completion?.text, "héllo 🙂");
  assert.deepEqual(
    completion?.tokens.map((token) => [...token.piece]),
    halves.map((half) => [...half]),
  );
});

test("gather puts interleaved sequences together, in the order in which they finished", async (t) => {
  const seed = 2n ** 64n - 1n;
  const events = [
    started({ sequenceCount: 2, seed }),
    delta("a", 0),
    delta("x", 1),
    delta("y", 1),
    finished(1),
    delta("b", 0),
    finished(0),
  ];
  const client = await clientOf(t, { generateLDA: plays(events) });
  const stream = client.generate(REQUEST);
  const completions = await stream.gather();
  assert.equal(stream.started?.generationId, "g-1");
  assert.deepEqual(
    completions.map(({ sequenceIndex, text, seed }) => [sequenceIndex, text, seed]),
    [
      [1, "xy", seed],
      [0, "ab", seed],
    ],
  );
});

test("a sequence index counts for each role on its own", async (t) => {
  const both = (role: ModelRole) => ({ sequenceIndex: 0, role });
  const client = await clientOf(t, {
    async *generateBoth() {
      yield { event: { case: "started", value: { sequenceCount: 2 } } };
      yield { event: { case: "delta", value: { ...both(ModelRole.BEFORE), text: "old" } } };
      yield { event: { case: "delta", value: { ...both(ModelRole.AFTER), text: "new" } } };
      yield { event: { case: "finished", value: { ...both(ModelRole.AFTER), reason: FinishReason.EOS } } };
      yield { event: { case: "finished", value: { ...both(ModelRole.BEFORE), reason: FinishReason.EOS } } };
    },
  });
  const completions = await client.generateBoth(REQUEST).gather();
  assert.deepEqual(
    completions.map(({ role, text }) => [role, text]),
    [
      [ModelRole.AFTER, "new"],
      [ModelRole.BEFORE, "old"],
    ],
  );
});

test("scores are found under the alphas as the caller wrote them, though the wire rounds them", async (t) => {
  const alphaScores = [{ alpha: 0.1, logprob: -1.5 }];
  const client = await clientOf(t, {
    generateLDA: plays([started(), { event: { case: "finished", value: { alphaScores } } }]),
    async *score() {
      yield create(ScoreResponseSchema, { offset: 0, tokens: [{ id: 1 }], totalTokenCount: 2 });
      yield create(ScoreResponseSchema, { offset: 1, tokens: [{ id: 2 }], totalTokenCount: 2, alphaScores });
    },
  });
  const [completion] = await client.complete({ ...REQUEST, output: { scoreAlphas: [0.1] } });
  assert.equal(completion?.alphaScores.get(0.1), -1.5);
  const scored = await client.score({ ...REQUEST, continuation: REQUEST.prompt, scoreAlphas: [0.1] }).gather();
  assert.equal(scored.alphaScores.get(0.1), -1.5);
  assert.deepEqual(
    scored.tokens.map((token) => token.id),
    [1, 2],
  );
});

test("an event of a kind that only a newer server knows is skipped", async (t) => {
  const events = [create(GenerateLDAResponseSchema), started(), {}, delta("a"), {}, finished(), {}];
  const client = await clientOf(t, { generateLDA: plays(events) });
  const kinds: (string | undefined)[] = [];
  for await (const { event } of client.generate(REQUEST)) kinds.push(event.case);
  assert.deepEqual(kinds, ["started", "delta", "finished"]);
});

const BROKEN: Record<string, EventInit[]> = {
  "nothing at all": [],
  "a delta before started": [delta("a"), started(), finished()],
  "started twice": [started(), started(), finished()],
  "an end before every sequence has finished": [started({ sequenceCount: 2 }), delta("a"), finished()],
  "a delta after its sequence has finished": [started(), finished(), delta("a")],
  "a sequence that finishes twice": [started(), finished(), finished()],
  "the end of another sequence than the announced one": [started(), finished(5)],
  "more sequences than announced": [started(), finished(0), finished(1)],
};
for (const [what, events] of Object.entries(BROKEN)) {
  test(`a stream with ${what} is broken, though its status is OK`, async (t) => {
    const client = await clientOf(t, { generateLDA: plays(events) });
    const error = await errorOf(client.complete(REQUEST));
    assert.ok(error instanceof StreamBroken);
    assert.equal(error.code, undefined);
  });
}

const BROKEN_SCORES: Record<string, [number, number][]> = {
  "no block": [],
  "a gap": [
    [0, 1],
    [2, 1],
  ],
  "an early end": [[0, 2]],
};
for (const [what, blocks] of Object.entries(BROKEN_SCORES)) {
  test(`a score with ${what} is broken, though its status is OK`, async (t) => {
    const client = await clientOf(t, {
      async *score() {
        for (const [offset, count] of blocks)
          yield { offset, tokens: Array(count).fill({ id: 1 }), totalTokenCount: 3 };
      },
    });
    const error = await errorOf(client.score({ ...REQUEST, continuation: REQUEST.prompt }).gather());
    assert.ok(error instanceof StreamBroken);
  });
}

/** A script that holds after `started` and a delta, and tells when its call was cancelled. */
function holding() {
  const cancelled = latch();
  return {
    cancelled: cancelled.opened,
    script: {
      async *generateLDA(_: unknown, context: Parameters<typeof holdUntilCancelled>[0]) {
        yield create(GenerateLDAResponseSchema, started());
        yield create(GenerateLDAResponseSchema, delta("a"));
        await holdUntilCancelled(context, cancelled);
      },
    },
  };
}

test("break cancels the call on the server, and the stream is over", async (t) => {
  const { script, cancelled } = holding();
  const client = await clientOf(t, script);
  const stream = client.generate(REQUEST);
  for await (const { event } of stream) if (event.case === "delta") break;
  await cancelled;
  assert.deepEqual(await stream.next(), { done: true, value: undefined });
});

test("break out of text() cancels the call on the server", async (t) => {
  const { script, cancelled } = holding();
  const client = await clientOf(t, script);
  for await (const piece of client.generate(REQUEST).text()) if (piece.text) break;
  await cancelled;
});

test("await using cancels the call on the server at the end of its block", async (t) => {
  const { script, cancelled } = holding();
  const client = await clientOf(t, script);
  {
    await using stream = client.generate(REQUEST);
    await stream.next();
  }
  await cancelled;
});

test("close from elsewhere ends a loop that waits, without an error, and cancels the call", async (t) => {
  const { script, cancelled } = holding();
  const client = await clientOf(t, script);
  const stream = client.generate(REQUEST);
  const texts: string[] = [];
  for await (const { event } of stream) {
    if (event.case !== "delta") continue;
    texts.push(event.value.text);
    setImmediate(() => void stream.close());
  }
  assert.deepEqual(texts, ["a"]);
  await cancelled;
});

test("gather of a stream that was closed gives no half answer", async (t) => {
  const { script } = holding();
  const client = await clientOf(t, script);
  const stream = client.generate(REQUEST);
  await stream.close();
  assert.ok((await errorOf(stream.gather())) instanceof StreamBroken);
});

test("gather of a stream that was begun is a mistake", async (t) => {
  const client = await clientOf(t, { generateLDA: plays([started(), finished()]) });
  const stream = client.generate(REQUEST);
  await stream.next();
  await assert.rejects(stream.gather(), TypeError);
});

test("an aborted signal fails the call with Aborted and its reason, and cancels it on the server", async (t) => {
  const { script, cancelled } = holding();
  const client = await clientOf(t, script);
  const controller = new AbortController();
  const stream = client.generate(REQUEST, { signal: controller.signal });
  await stream.next();
  await stream.next();
  const waiting = errorOf(stream.next());
  controller.abort(new Error("enough"));
  const error = await waiting;
  assert.ok(error instanceof Aborted);
  assert.equal(error.code, "CANCELLED");
  assert.equal((error.cause as Error).message, "enough");
  await cancelled;
});

test("a signal that was aborted before makes no call", async (t) => {
  let calls = 0;
  const client = await clientOf(t, {
    async *generateLDA() {
      calls++;
    },
  });
  const signal = AbortSignal.abort();
  assert.ok((await errorOf(client.complete(REQUEST, { signal }))) instanceof Aborted);
  assert.ok((await errorOf(client.modelPair({ signal }))) instanceof Aborted);
  assert.equal(calls, 0);
});

test("a stream whose events nobody asks for makes no call", async (t) => {
  let calls = 0;
  const client = await clientOf(t, {
    async *generateLDA() {
      calls++;
    },
    getLoad: () => ({ openRequests: 0 }),
  });
  client.generate(REQUEST);
  await client.load();
  assert.equal(calls, 0);
});

test("a deadline is sent to the server, and ends the call with DeadlineExceeded", async (t) => {
  let sentMs: number | undefined;
  const client = await clientOf(t, {
    async *generateLDA(_, context) {
      sentMs = context.timeoutMs();
      yield create(GenerateLDAResponseSchema, started());
      await holdUntilCancelled(context, latch());
    },
  });
  const error = await errorOf(client.complete(REQUEST, { timeoutMs: 150 }));
  assert.ok(error instanceof DeadlineExceeded);
  assert.equal(error.code, "DEADLINE_EXCEEDED");
  assert.ok(sentMs !== undefined && sentMs > 0 && sentMs <= 150);
});

test("the deadline of the client holds where a call names none", async (t) => {
  const { script } = holding();
  const client = await clientOf(t, script, { timeoutMs: 100 });
  assert.ok((await errorOf(client.complete(REQUEST))) instanceof DeadlineExceeded);
});

for (const timeoutMs of [0, -1, NaN, Infinity, 1e8]) {
  test(`a deadline of ${timeoutMs} ms is a mistake`, async (t) => {
    const client = await clientOf(t, {});
    assert.throws(() => client.generate(REQUEST, { timeoutMs }), RangeError);
    await assert.rejects(client.modelPair({ timeoutMs }), RangeError);
  });
}

test("a request that cannot be sent is a TypeError that names the field, before any call", async (t) => {
  const client = await clientOf(t, {});
  assert.throws(() => client.generate({ ...REQUEST, numSequences: -1 }), /TypeError.*num_sequences/);
  await assert.rejects(client.complete({ ...REQUEST, sampling: { seed: 2n ** 64n } }), TypeError);
});
