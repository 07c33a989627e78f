/** The adapter, asked as the runner of clients/conformance asks it, against the real server over a fake engine. */
import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { existsSync } from "node:fs";
import { createInterface } from "node:readline";
import { test, type TestContext } from "node:test";
import { fileURLToPath } from "node:url";

const ROOT = fileURLToPath(new URL("../../../..", import.meta.url));
const ADAPTER = fileURLToPath(new URL("../conformance/adapter.js", import.meta.url));
const PYTHON = process.env.LDA_PYTHON ?? `${ROOT}.venv/bin/python`;

/** Start the server; its port once it is ready. */
async function serveFake(t: TestContext): Promise<string> {
  const server = spawn(PYTHON, ["tests/server_harness.py"], {
    cwd: ROOT,
    env: { ...process.env, PYTHONPATH: "tests:clients/python" },
    stdio: ["ignore", "pipe", "ignore"],
  });
  t.after(() => server.kill());
  let port = "";
  for await (const line of createInterface({ input: server.stdout })) {
    if (line.startsWith("port")) port = line.split(" ")[1] ?? "";
    if (line === "ready") break;
  }
  assert.ok(port, "the server did not start");
  return port;
}

/** Ask the adapter these calls, and wait for its end. */
async function ask(calls: readonly object[]): Promise<Record<string, any>[]> {
  const adapter = spawn(process.execPath, [ADAPTER], { stdio: ["pipe", "pipe", "inherit"] });
  adapter.stdin.end(calls.map((call) => `${JSON.stringify(call)}\n`).join(""));
  const answers = [];
  for await (const line of createInterface({ input: adapter.stdout })) answers.push(JSON.parse(line));
  return answers;
}

const skip = !existsSync(PYTHON) && `there is no ${PYTHON}; LDA_PYTHON names another one`;

test("the adapter answers every call in order, a line each, and ends with its input", { skip }, async (t) => {
  const target = `127.0.0.1:${await serveFake(t)}`;
  const request = { prompt: { text: "hi" }, stopping: { maxNewTokens: 3 }, sampling: { seed: "18446744073709551615" } };
  const answers = await ask([
    { id: "stream", target, verb: "generate", request },
    { id: "whole", target, verb: "complete", request },
    { id: "left", target, verb: "generate", request, cancelAfter: 2 },
    { id: "refused", target, verb: "score", request: { prompt: { text: "full" }, continuation: { text: "a" } } },
    { id: "looked up", target, verb: "modelPair" },
    { id: "impossible", target, verb: "dance" },
  ]);
  const [stream, whole, left, refused, lookedUp, impossible] = answers;
  assert.deepEqual(
    answers.map(({ id }) => id),
    ["stream", "whole", "left", "refused", "looked up", "impossible"],
  );
  assert.equal(stream?.ended, "ok");
  assert.equal(stream.events[0].started.seed, "18446744073709551615");
  assert.equal(stream.events.length, 5);
  assert.deepEqual(whole?.result[0].tokenIds, [97, 98, 99]);
  assert.equal(whole.result[0].reason, "FINISH_REASON_MAX_TOKENS");
  assert.deepEqual([left?.ended, left?.events.length], ["cancelled", 2]);
  assert.deepEqual([refused?.error.class, refused?.error.code], ["QueueFull", "RESOURCE_EXHAUSTED"]);
  assert.equal(refused?.error.retryAfterS, 2);
  assert.equal(lookedUp?.result.after.modelId, "fake");
  assert.match(impossible?.unsupported, /dance/);
});
