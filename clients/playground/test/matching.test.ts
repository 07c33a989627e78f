// A filter finds what it says; one that is no expression is a sentence and no crash.
import { expect, test } from "vitest";
import { compile, complaint, spansOf } from "../src/matching";

const filter = (pattern: string, kind: "text" | "regex" = "text", matchCase = false) => ({ pattern, kind, matchCase });

test("text is taken letter by letter", () => {
  expect(spansOf(compile(filter("a.b(")), "xA.B( aab")).toEqual([[1, 5]]);
  expect(spansOf(compile(filter("A", "text", true)), "aA")).toEqual([[1, 2]]);
  expect(spansOf(compile(filter("- / {}")), "- / {}")).toHaveLength(1);
});

test("an expression gives its matches, empty ones too", () => {
  expect(spansOf(compile(filter("^|🌻", "regex")), "a🌻")).toEqual([
    [0, 0],
    [1, 3],
  ]);
});

test("a broken expression is explained", () => {
  try {
    compile(filter("(", "regex"));
    expect.unreachable();
  } catch (error) {
    expect(complaint(error)).toMatch(/^This is no regular expression: Unterminated group\.$/);
  }
});
