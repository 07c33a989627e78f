// Real gateways for the tests: over the bundled pair, and over the fake engine, which is fast and does as it is told.
import { spawn } from "node:child_process";
import { once } from "node:events";
import { createInterface } from "node:readline";
import { createServer } from "node:net";
import { delimiter, join } from "node:path";
import { fileURLToPath } from "node:url";

export const ROOT = fileURLToPath(new URL("../../..", import.meta.url));
export const PYTHON = process.env.PYTHON ?? join(ROOT, ".venv/bin/python");
const WAIT_MS = 120_000;

/** A server process with its Envoy. */
export class Gateway {
  #process;
  #lines = [];
  #listeners = new Set();

  constructor(command, environment = {}) {
    this.#process = spawn(command[0], command.slice(1), {
      cwd: ROOT,
      env: { ...process.env, ...environment },
      stdio: ["ignore", "pipe", process.env.E2E_LOG ? "inherit" : "ignore"],
    });
    createInterface({ input: this.#process.stdout }).on("line", (line) => {
      this.#lines.push(line);
      for (const listener of this.#listeners) listener();
    });
    this.ended = once(this.#process, "exit");
  }

  /** Wait for a line of standard output; what the expression found. */
  async told(expression) {
    const { promise, resolve, reject } = Promise.withResolvers?.() ?? withResolvers();
    const look = () => {
      const found = this.#lines.map((line) => expression.exec(line)).find(Boolean);
      if (found) resolve(found);
    };
    this.#listeners.add(look);
    const timer = setTimeout(() => reject(new Error(`no line like ${expression}: ${this.#lines.join("\n")}`)), WAIT_MS);
    this.ended.then(() => reject(new Error(`the server ended: ${this.#lines.join("\n")}`)));
    look();
    try {
      return await promise;
    } finally {
      clearTimeout(timer);
      this.#listeners.delete(look);
    }
  }

  /** End it; Envoy goes with it. */
  async stop(signal = "SIGTERM") {
    this.#process.kill(signal);
    await this.ended;
  }
}

function withResolvers() {
  const made = {};
  made.promise = new Promise((resolve, reject) => Object.assign(made, { resolve, reject }));
  return made;
}

/** `lda-service gateway` over the bundled pair, ready. */
export async function realGateway() {
  const flags = ["--port", "0", "--http-port", "0", "--drain-grace", "0"];
  const gateway = new Gateway([PYTHON, "-m", "lda_service", "gateway", ...flags]);
  gateway.url = (await gateway.told(/http on (\S+)/))[1];
  await gateway.told(/^ready/);
  return gateway;
}

/** The gateway over the fake engine of the tests; `gate` is a named pipe that holds up its loading. */
export async function fakeGateway({ port = 0, gate, ...options } = {}) {
  const folders = [ROOT, join(ROOT, "tests"), join(ROOT, "tests/mesh"), join(ROOT, "clients/python")];
  const settings = { port: 0, http: port, drain_grace_s: 0, ...options };
  const environment = { PYTHONPATH: folders.join(delimiter), ...(gate && { MESH_LOADING_GATE: gate }) };
  const gateway = new Gateway([PYTHON, join(ROOT, "tests/mesh/replica.py"), JSON.stringify(settings)], environment);
  gateway.url = `http://127.0.0.1:${(await gateway.told(/^http (\d+)/))[1]}`;
  if (!gate) await gateway.told(/^ready/);
  return gateway;
}

/** A port that is free now, and likely to be in a moment. */
export async function freePort() {
  const server = createServer().listen(0, "127.0.0.1");
  await once(server, "listening");
  const { port } = server.address();
  server.close();
  await once(server, "close");
  return port;
}

/** How many requests are open on the server. */
export async function openRequests({ url }) {
  const load = await (await fetch(`${url}/v1/load`)).json();
  return load.open_requests;
}

/** Wait until a condition holds; the last answer is in the complaint. */
export async function until(ask, holds, what, waitMs = 30_000) {
  const deadline = Date.now() + waitMs;
  for (;;) {
    const answer = await ask();
    if (holds(answer)) return answer;
    if (Date.now() > deadline) throw new Error(`never ${what}; at last: ${JSON.stringify(answer)}`);
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
}
