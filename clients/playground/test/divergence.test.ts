// The first difference is marked once it is known, and not before.
import { expect, test } from "vitest";
import { divergence } from "../src/divergence";

const track = (ids: number[], ended = false) => ({ ids, ended });

test("tracks part where the first of them differs", () => {
  expect(divergence([track([1, 2, 3]), track([1, 2, 4]), track([1, 2, 3])])).toEqual({ kind: "parted", at: 2 });
});

test("a difference counts once no track can part before it", () => {
  expect(divergence([track([1, 2]), track([1, 3]), track([1])])).toEqual({ kind: "parted", at: 1 });
  expect(divergence([track([1, 2]), track([1, 3]), track([])])).toEqual({ kind: "open", shared: 0 });
});

test("what agrees so far may still part", () => {
  expect(divergence([track([1, 2, 3], true), track([1, 2])])).toEqual({ kind: "open", shared: 2 });
});

test("a track that ended parts from one that goes on", () => {
  expect(divergence([track([1], true), track([1, 2])])).toEqual({ kind: "parted", at: 1 });
});

test("tracks that ended alike are the same", () => {
  expect(divergence([track([1, 2], true), track([1, 2], true)])).toEqual({ kind: "same", shared: 2 });
});
