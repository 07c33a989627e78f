/** One prompt at several alphas, on the same noise: what changes is alpha alone. */
import assert from "node:assert/strict";
import { type Completion, ModelRole, text } from "@lda/client";
import { connectNode } from "@lda/client/node";

const client = connectNode(process.env.LDA_TARGET ?? "127.0.0.1:50051");
// section:alpha_sweep
const shared = {
  prompt: text("Good morning"),
  sampling: { seed: 7n, temperature: 0 },
  stopping: { maxNewTokens: 40 },
};

const texts = new Map<number, string>();
for (const alpha of [0, 0.5, 1]) {
  for (const completion of await client.complete({ ...shared, alpha, output: { diagnostics: true } })) {
    console.log(`alpha ${alpha}, mean KL ${meanKl(completion).toFixed(3)}:`, completion.text);
    texts.set(alpha, completion.text);
  }
}

/** How far apart the two models are, in nats per token. */
function meanKl({ tokens }: Completion): number {
  return tokens.reduce((sum, token) => sum + (token.diagnostics?.afterBeforeKl ?? 0), 0) / tokens.length;
}
// endsection:alpha_sweep

// section:both
const both = await client.generateBoth(shared).gather();
const after = both.find((each) => each.role === ModelRole.AFTER);
const before = both.find((each) => each.role === ModelRole.BEFORE);
console.log("after: ", after?.text);
console.log("before:", before?.text);
// endsection:both

assert.equal(texts.get(0), after?.text);
console.log("ok");
