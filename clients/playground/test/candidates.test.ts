// Candidates of other alphas get the amplified log-probability that the server would give them.
import type { Candidate } from "@lda/client";
import { expect, test } from "vitest";
import { union } from "../src/candidates";

const logSoftmax = (logits: number[]) => {
  const sum = Math.log(logits.reduce((total, logit) => total + Math.exp(logit), 0));
  return logits.map((logit) => logit - sum);
};

test("the amplified law of all tokens sums to one", () => {
  const after = logSoftmax([2, 1, 0, -1]);
  const before = logSoftmax([0, 1, 2, 0]);
  const amplified = logSoftmax(after.map((value, id) => value + 1.5 * (value - before[id]!)));
  const candidate = (id: number, alphaOwn: number) =>
    ({
      id,
      afterLogprob: after[id],
      beforeLogprob: before[id],
      amplifiedLogprob: alphaOwn === 1.5 ? amplified[id] : after[id],
    }) as Candidate;
  const all = union([candidate(0, 1.5), candidate(1, 1.5)], [candidate(1, 0), candidate(2, 0), candidate(3, 0)], 1.5);
  expect(all.map(({ id }) => id)).toEqual([0, 1, 2, 3]);
  for (const { id, amplifiedLogprob } of all) expect(amplifiedLogprob).toBeCloseTo(amplified[id]!, 10);
});

test("what one of the models rules out has no amplified value of its own", () => {
  const known = { id: 0, afterLogprob: -1, beforeLogprob: -1, amplifiedLogprob: -1 } as Candidate;
  const ruledOut = { id: 1, afterLogprob: -2, amplifiedLogprob: -2 } as Candidate;
  expect(union([known], [ruledOut], 1)[1]!.amplifiedLogprob).toBeUndefined();
});
