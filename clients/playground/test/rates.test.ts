// Intervals are the exact ones that the project's tables print.
import { expect, test } from "vitest";
import { betaCdf, percent, rateOf } from "../src/rates";

test.each([
  // From the table of the bundled pair in the README, which scipy computed.
  [21, 20013, 0.00065, 0.0016],
  [49, 4011, 0.00905, 0.0161],
  [2402, 4011, 0.583, 0.614],
  [0, 4011, 0, 0.000919],
])("%i of %i lies between %f and %f", (hits, total, low, high) => {
  const rate = rateOf(hits, total);
  expect(rate.low).toBeCloseTo(low, 3 - Math.floor(Math.log10(high)) - 2);
  expect(rate.high / high).toBeCloseTo(1, 2);
});

test("small numbers agree with published tables", () => {
  const five = rateOf(5, 10);
  expect(five.low).toBeCloseTo(0.1871, 4);
  expect(five.high).toBeCloseTo(0.8129, 4);
  expect(rateOf(10, 10).low).toBeCloseTo(0.6915, 4);
  expect(rateOf(10, 10).high).toBe(1);
});

test("of nothing drawn, anything is possible", () => {
  expect(rateOf(0, 0)).toMatchObject({ low: 0, high: 1, rate: NaN });
});

test("the beta function is that of the uniform law at 1, 1, and symmetrical", () => {
  expect(betaCdf(0.3, 1, 1)).toBeCloseTo(0.3, 12);
  expect(betaCdf(0.2, 3, 7) + betaCdf(0.8, 7, 3)).toBeCloseTo(1, 12);
});

test("rare shares keep two digits", () => {
  expect([0, 0.000919, 0.0105, 0.599, 1, NaN].map(percent)).toEqual(["0%", "0.092%", "1.1%", "59.9%", "100%", "–"]);
});
