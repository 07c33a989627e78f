import { create } from "@bufbuild/protobuf";
import { Code, ConnectError } from "@connectrpc/connect";
import { GenerateLDAResponseSchema, ServerAway } from "@lda/client";
import assert from "node:assert/strict";
import * as http2 from "node:http2";
import { test, type TestContext } from "node:test";
import { connectNode } from "@lda/client/node";
import { clientOf, delta, errorOf, finished, handlerOf, latch, listen, plays, REQUEST, started } from "./harness.js";

/** A client of a server that refuses so many calls with this code, before any headers, and then answers. */
async function flaky(t: TestContext, refusals: number, code = Code.Unavailable) {
  const count = { attempts: 0, refused: latch() };
  const answer = handlerOf({
    generateLDA: plays([started(), delta("a"), finished()]),
    getModelPair: () => ({ device: "cpu" }),
  });
  const server = http2.createServer((request, response) => {
    if (++count.attempts > refusals) return answer(request, response);
    const status = { ":status": 200, "content-type": "application/grpc", "grpc-status": String(code) };
    response.stream.respond(status, { endStream: true });
    count.refused.open();
  });
  const client = connectNode(await listen(t, server));
  t.after(() => client.close());
  return { client, count };
}

test("a stream that is refused three times with UNAVAILABLE succeeds at the fourth attempt", async (t) => {
  const { client, count } = await flaky(t, 3);
  const begun = Date.now();
  const [completion] = await client.complete(REQUEST);
  assert.equal(completion?.text, "a");
  assert.equal(count.attempts, 4);
  assert.ok(Date.now() - begun >= 0.8 * (100 + 200 + 400), "the pauses double from 0.1 s");
});

test("a short call is tried again as well, and gives up after four attempts", async (t) => {
  const patient = await flaky(t, 1);
  assert.equal((await patient.client.modelPair()).device, "cpu");
  const hopeless = await flaky(t, 9);
  assert.ok((await errorOf(hopeless.client.modelPair())) instanceof ServerAway);
  assert.equal(hopeless.count.attempts, 4);
});

test("nothing but UNAVAILABLE is tried again", async (t) => {
  const { client, count } = await flaky(t, 1, Code.ResourceExhausted);
  await errorOf(client.complete(REQUEST));
  assert.equal(count.attempts, 1);
});

test("a stream that has begun is not tried again", async (t) => {
  let attempts = 0;
  const client = await clientOf(t, {
    async *generateLDA() {
      attempts++;
      yield create(GenerateLDAResponseSchema, started());
      throw new ConnectError("as the test says", Code.Unavailable);
    },
  });
  await errorOf(client.complete(REQUEST));
  assert.equal(attempts, 1);
});

test("once the server has answered with headers, nothing is tried again", async (t) => {
  let attempts = 0;
  const server = http2.createServer();
  server.on("stream", (stream) => {
    attempts++;
    stream.respond({ ":status": 200, "content-type": "application/grpc" }, { waitForTrailers: true });
    stream.on("wantTrailers", () => stream.sendTrailers({ "grpc-status": "14" }));
    stream.end();
  });
  const client = connectNode(await listen(t, server));
  t.after(() => client.close());
  assert.ok((await errorOf(client.complete(REQUEST))) instanceof ServerAway);
  assert.equal(attempts, 1);
});

test("leaving between two attempts ends the call at once, without another attempt", async (t) => {
  const { client, count } = await flaky(t, 9);
  const stream = client.generate(REQUEST);
  const waiting = stream.next();
  await count.refused.opened;
  await stream.close();
  assert.deepEqual(await waiting, { done: true, value: undefined });
  assert.equal(count.attempts, 1);
});

test("the deadline holds over all attempts together", async (t) => {
  const { client } = await flaky(t, 9);
  const begun = Date.now();
  const error = await errorOf(client.complete(REQUEST, { timeoutMs: 150 }));
  assert.equal(error.name, "DeadlineExceeded");
  assert.ok(Date.now() - begun < 600, "four attempts would have taken 0.7 s");
});
