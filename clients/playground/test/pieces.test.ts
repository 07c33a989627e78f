// Tokens are bytes; nothing of a character is shown before the whole of it is there.
import { expect, test } from "vitest";
import { label, PieceDecoder, tint, TINT_STEPS, wholeText } from "../src/pieces";

test("a character of three tokens appears with the last", () => {
  const decoder = new PieceDecoder();
  const bytes = [...new TextEncoder().encode("月")].map((byte) => Uint8Array.of(byte));
  expect(bytes.map((piece) => decoder.next(piece))).toEqual(["", "", "月"]);
});

test("labels show what is invisible", () => {
  expect(label(new TextEncoder().encode(" is\n"))).toBe("␣is↵");
  expect(label(Uint8Array.of(0xe6, 0x9c))).toBe("⟨e6⟩⟨9c⟩");
  expect(wholeText(Uint8Array.of(0xe6))).toBeUndefined();
});

test("tints are symmetrical and end somewhere", () => {
  expect([tint(-1, -1), tint(-1, -2.5), tint(-2.5, -1)]).toEqual([0, 2, -2]);
  expect([tint(0, -99), tint(-99, 0)]).toEqual([TINT_STEPS, -TINT_STEPS]);
  expect(tint(undefined, -1)).toBe(0);
});
