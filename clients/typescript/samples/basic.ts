/** Draw two completions of a prompt. */
import assert from "node:assert/strict";
// section:basic
import { FinishReason, text } from "@lda/client";
import { connectNode } from "@lda/client/node";

const client = connectNode(process.env.LDA_TARGET ?? "127.0.0.1:50051");

const completions = await client.complete({
  prompt: text("Good morning"),
  alpha: 0.5,
  numSequences: 2,
  stopping: { maxNewTokens: 40 },
});
for (const { sequenceIndex, reason, text } of completions) {
  console.log(sequenceIndex, FinishReason[reason], text);
}
// endsection:basic

assert.equal(completions.length, 2);
for (const completion of completions) {
  assert.notEqual(completion.reason, FinishReason.UNSPECIFIED);
  assert.notEqual(completion.text, "");
}
console.log("ok");
