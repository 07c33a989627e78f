/** Print text as it arrives. The pieces add up to what a gathered call gives for the same seed. */
import assert from "node:assert/strict";
import { text } from "@lda/client";
import { connectNode } from "@lda/client/node";

const client = connectNode(process.env.LDA_TARGET ?? "127.0.0.1:50051");
// section:stream
const request = { prompt: text("Good morning"), alpha: 0.5, sampling: { seed: 7n }, stopping: { maxNewTokens: 40 } };
const stream = client.generate(request);
let printed = "";
for await (const piece of stream.text()) {
  process.stdout.write(piece.text);
  printed += piece.text;
}
console.log("\nseed", stream.started?.seed);
// endsection:stream

assert.equal(stream.started?.seed, 7n);
const [gathered] = await client.complete(request);
assert.equal(printed, gathered?.text);
console.log("ok");
