// What a person writes becomes a value that the contract takes, or nothing.
import { expect, test } from "vitest";
import { parseAlphas, parseNumber, parseSeed } from "../src/settings";

test("numbers", () => {
  expect(parseNumber("alpha", " −1 ")).toBe(-1);
  expect(["", "x", "101", "Infinity", "NaN"].map((text) => parseNumber("alpha", text))).toEqual(
    Array(5).fill(undefined),
  );
  expect(parseNumber("topK", "1.5")).toBeUndefined();
});

test("a list of alphas is sorted and without repetition", () => {
  expect(parseAlphas("1, 0.5 0;-1,1")).toEqual([-1, 0, 0.5, 1]);
  expect(["", "1,a", "200"].map(parseAlphas)).toEqual([undefined, undefined, undefined]);
});

test("seeds are whole numbers of 64 bits", () => {
  expect(parseSeed("18446744073709551615")).toBe("18446744073709551615");
  expect(["18446744073709551616", "-1", "1.5", ""].map(parseSeed)).toEqual(Array(4).fill(undefined));
  expect(parseSeed("007")).toBe("7");
});
