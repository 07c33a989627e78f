/** Leave a long generation early. The server frees its place at the next decoding step. */
import assert from "node:assert/strict";
import { setTimeout as sleep } from "node:timers/promises";
import { text } from "@lda/client";
import { connectNode } from "@lda/client/node";

const client = connectNode(process.env.LDA_TARGET ?? "127.0.0.1:50051");
// section:cancel
const request = { prompt: text("Good morning"), stopping: { maxNewTokens: 400, ignoreEos: true } };
let tokens = 0;
const stream = client.generate(request);
for await (const { event } of stream) {
  if (event.case === "delta") tokens += event.value.tokens.length;
  if (tokens >= 3) break;
}
// endsection:cancel

assert.ok(tokens < 400, "it was left before its end");
assert.deepEqual(await stream.next(), { done: true, value: undefined });
await assert.rejects(client.generate(request, { signal: AbortSignal.abort() }).gather(), { name: "Aborted" });

const giveUpAt = Date.now() + 10_000;
while ((await client.load()).openRequests > 0) {
  assert.ok(Date.now() < giveUpAt, "the server still holds the request");
  await sleep(20);
}
console.log("ok");
