// A link brings back what was set, and a broken one brings back what it can.
import { expect, test } from "vitest";
import { fromFragment, toFragment } from "../src/link";
import { DEFAULTS, freshDefaults, type Settings } from "../src/settings";

const EVERYTHING: Settings = {
  view: "rollouts",
  form: "text",
  turns: [
    { role: "system", content: "Be = kind & brief #1\n" },
    { role: "user", content: "月? 🌻" },
    { role: "assistant", content: "" },
  ],
  text: "Once upon\ta time",
  prefill: true,
  fork: { via: "ids", ids: [5, 0, 4294967295], kept: "Sure" },
  alpha: -0.25,
  temperature: 0,
  topP: 0.95,
  topK: 40,
  minP: 0.05,
  plausibility: 0.1,
  maxNewTokens: 64,
  stop: ["\n\n", "END"],
  sequences: 4,
  seed: "18446744073709551615",
  seedLocked: true,
  alphas: [-1, 0, 0.3, 20],
  rollouts: 256,
  filter: "Glimmer(Coin)?\\b",
  filterKind: "regex",
  matchCase: true,
};

test("everything that can be set survives the way through a link", () => {
  expect(fromFragment(`#${toFragment(EVERYTHING)}`)).toEqual({ settings: EVERYTHING, ignored: [], newer: false });
});

test("defaults need no more than a version", () => {
  expect(toFragment(freshDefaults())).toBe("v=1");
  expect(fromFragment("").settings).toEqual(DEFAULTS);
});

test("a value left to the server stays so, though the page has a default", () => {
  const settings = { ...freshDefaults(), temperature: undefined, maxNewTokens: undefined };
  expect(fromFragment(toFragment(settings)).settings).toEqual(settings);
});

test("what cannot be read is named, and the rest is taken", () => {
  const { settings, ignored } = fromFragment(
    "#v=1&alpha=much&turns=[[1,2]]&topP=0.5&fork={}&seed=-1&stop=[%22%22]&new=1",
  );
  expect(ignored).toEqual(["alpha", "turns", "fork", "seed", "stop", "new"]);
  expect(settings).toEqual({ ...freshDefaults(), topP: 0.5 });
});

test("a link of a later page says so", () => {
  expect(fromFragment("v=2&alpha=2")).toMatchObject({ newer: true, settings: { alpha: 2 } });
});

test.each(["#", "#%", "#v", "#=&&=", "#v=1&turns=%E0%A4%A", "#__proto__=1&constructor=2", "#" + "a".repeat(1e5)])(
  "nonsense does no harm: %.20s",
  (fragment) => {
    expect(fromFragment(fragment).settings).toEqual(DEFAULTS);
  },
);
