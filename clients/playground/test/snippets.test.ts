// Code that the page gives away means what the page does. e2e runs it; here are the corners.
import { expect, test } from "vitest";
import { freshDefaults, type Settings } from "../src/settings";
import { pythonLiteral, shellQuoted, snippet } from "../src/snippets";

const ORIGIN = "http://127.0.0.1:8000";
const settings = (patch: Partial<Settings>): Settings => ({ ...freshDefaults(), ...patch });

test("a quote in a prompt stays inside the shell's word", () => {
  expect(shellQuoted("it's")).toBe(`'it'\\''s'`);
});

test("Python literals", () => {
  expect(pythonLiteral([true, 2n ** 64n - 1n, 'a"\n🌻', { role: "user" }])).toBe(
    '[True, 18446744073709551615, "a\\"\\n🌻", {"role": "user"}]',
  );
});

test("a raw prompt is raw in every language", () => {
  const raw = settings({ form: "text", text: "Once" });
  expect(snippet("curl", raw, ORIGIN)).toContain('"prompt":{"text":"Once"}');
  expect(snippet("python", raw, ORIGIN)).toContain('"raw": True');
  expect(snippet("typescript", raw, ORIGIN)).toContain('prompt: text("Once")');
});

test("a fork by ids sends the ids", () => {
  const forked = settings({ fork: { via: "ids", ids: [1, 2], kept: "x" } });
  expect(snippet("python", forked, ORIGIN)).toContain("PROMPT = [1, 2]");
  expect(snippet("typescript", forked, ORIGIN)).toContain("tokens([1,2])");
});

test("a fork through text continues the answer", () => {
  const forked = settings({ fork: { via: "text", kept: "Sure", tokens: 9 } });
  expect(snippet("python", forked, ORIGIN)).toContain('{"role": "assistant", "content": "Sure"}]');
  expect(snippet("python", forked, ORIGIN)).toContain('"continue_final_message": True');
});

test("greedy asks for one sequence, as the contract demands", () => {
  const greedy = settings({ temperature: 0, sequences: 4, seed: "18446744073709551615" });
  expect(snippet("python", greedy, ORIGIN)).toContain('"num_sequences": 1');
  expect(snippet("typescript", greedy, ORIGIN)).toContain("seed: 18446744073709551615n");
});

test("rollouts ask at every alpha", () => {
  const rollouts = settings({ view: "rollouts", alphas: [0, 1] });
  expect(snippet("curl", rollouts, ORIGIN).match(/generateLda/g)).toHaveLength(2);
});
