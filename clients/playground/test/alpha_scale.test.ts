// The slider reaches every alpha that the page promises, finely where most of the looking is done.
import { expect, test } from "vitest";
import { alphaAt, LAST_STOP, stopOf } from "../src/alpha_scale";

test("the ends are -1 and 20, and stops rise", () => {
  expect([alphaAt(0), alphaAt(LAST_STOP)]).toEqual([-1, 20]);
  for (let stop = 1; stop <= LAST_STOP; stop++) expect(alphaAt(stop)).toBeGreaterThan(alphaAt(stop - 1));
});

test("between -1 and 2 a stop is a hundredth", () => {
  expect(alphaAt(stopOf(0.5) + 1)).toBe(0.51);
  expect(alphaAt(stopOf(0))).toBe(0);
});

test("an alpha that is no stop finds its nearest, one outside the nearest end", () => {
  expect(alphaAt(stopOf(0.3333))).toBe(0.33);
  expect([stopOf(-50), stopOf(50)]).toEqual([0, LAST_STOP]);
});
