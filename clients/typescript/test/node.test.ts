import { create } from "@bufbuild/protobuf";
import { GenerateLDAResponseSchema, ServerAway } from "@lda/client";
import { connectNode } from "@lda/client/node";
import assert from "node:assert/strict";
import { execFile, execFileSync } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import * as http2 from "node:http2";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, test } from "node:test";
import { fileURLToPath } from "node:url";
import { inspect, promisify } from "node:util";
import {
  clientOf,
  delta,
  errorOf,
  finished,
  handlerOf,
  holdUntilCancelled,
  latch,
  listen,
  plays,
  REQUEST,
  serve,
  started,
} from "./harness.js";

const PACKAGE = fileURLToPath(new URL("../..", import.meta.url));
const ANSWERS = { getModelPair: () => ({ device: "cpu" }) };

const certificates = mkdtempSync(join(tmpdir(), "lda-certificates-"));
execFileSync(join(PACKAGE, "../../deploy/certificates.sh"), [certificates]);
after(() => rmSync(certificates, { recursive: true }));
const pem = (name: string) => readFileSync(join(certificates, name), "utf8");
const ca = pem("ca.crt");
const server = { cert: pem("server.crt"), key: pem("server.key") };
const mine = { certificate: pem("client.crt"), key: pem("client.key") };

test("the token goes with every call, as a bearer", async (t) => {
  const seen: (string | null)[] = [];
  const script = {
    async *generateLDA(_: unknown, { requestHeader }: { requestHeader: Headers }) {
      seen.push(requestHeader.get("authorization"));
      for (const event of [started(), finished()]) yield create(GenerateLDAResponseSchema, event);
    },
    getModelPair(_: unknown, { requestHeader }: { requestHeader: Headers }) {
      seen.push(requestHeader.get("authorization"));
      return {};
    },
  };
  const client = await clientOf(t, script, { token: "secret" });
  await client.complete(REQUEST);
  await client.modelPair();
  assert.deepEqual(seen, ["Bearer secret", "Bearer secret"]);
  const stranger = await clientOf(t, script);
  await stranger.modelPair();
  assert.equal(seen.at(-1), null);
});

test("over TLS the server must show a certificate of the authority", async (t) => {
  const target = await listen(t, http2.createSecureServer(server, handlerOf(ANSWERS)));
  const client = connectNode(target, { tls: { ca } });
  t.after(() => client.close());
  assert.equal((await client.modelPair()).device, "cpu");
  const error = await errorOf(connectNode(target, { tls: {} }).modelPair());
  assert.ok(error instanceof ServerAway);
  assert.equal(error.code, "UNAVAILABLE");
});

test("the certificate must bear the name of the target, or the one that is asked for", async (t) => {
  const target = await listen(t, http2.createSecureServer(server, handlerOf(ANSWERS)));
  const named = connectNode(target, { tls: { ca, serverName: "lda-service" } });
  t.after(() => named.close());
  assert.equal((await named.modelPair()).device, "cpu");
  const wrong = connectNode(target, { tls: { ca, serverName: "elsewhere" } });
  assert.ok((await errorOf(wrong.modelPair())) instanceof ServerAway);
});

test("over mutual TLS the client shows its certificate", async (t) => {
  const options = { ...server, ca, requestCert: true, rejectUnauthorized: true };
  const target = await listen(t, http2.createSecureServer(options, handlerOf(ANSWERS)));
  const client = connectNode(target, { tls: { ca, ...mine } });
  t.after(() => client.close());
  assert.equal((await client.modelPair()).device, "cpu");
  assert.ok((await errorOf(connectNode(target, { tls: { ca } }).modelPair())) instanceof ServerAway);
});

test("messages of 20 MiB arrive, larger ones are refused", async (t) => {
  const letters = (bytes: number) => [started(), delta("x".repeat(bytes)), finished()];
  const large = await clientOf(t, { generateLDA: plays(letters((20 << 20) - 1024)) });
  const [completion] = await large.complete(REQUEST);
  assert.equal(completion?.text.length, (20 << 20) - 1024);
  const tooLarge = await clientOf(t, { generateLDA: plays(letters(20 << 20)) });
  const error = await errorOf(tooLarge.complete(REQUEST));
  assert.deepEqual([error.name, error.code], ["Exhausted", "RESOURCE_EXHAUSTED"]);
});

test("a program ends by itself once its calls have ended, though it never closed the client", async (t) => {
  const target = await serve(t, { ...ANSWERS, generateLDA: plays([started(), delta("a"), delta("b"), finished()]) });
  const program = `
    import { text } from "@lda/client";
    import { connectNode } from "@lda/client/node";
    const client = connectNode("${target}");
    await client.modelPair({ timeoutMs: 60_000 });
    for await (const piece of client.generate({ prompt: text("hi") }, { timeoutMs: 60_000 }).text()) break;
    console.log("last line");`;
  const run = promisify(execFile)(process.execPath, ["--input-type=module", "-e", program], {
    cwd: PACKAGE,
    timeout: 20_000,
  });
  assert.equal((await run).stdout, "last line\n");
});

test("a silent call is kept alive by a ping every 30 s", async (t) => {
  const pinged = latch();
  const server = http2.createServer(
    handlerOf({
      async *generateLDA(_, context) {
        yield create(GenerateLDAResponseSchema, started());
        await holdUntilCancelled(context, latch());
      },
    }),
  );
  server.on("session", (session) => session.on("ping", pinged.open));
  t.mock.timers.enable({ apis: ["setTimeout"] });
  const client = connectNode(await listen(t, server));
  t.after(() => client.close());
  const stream = client.generate(REQUEST);
  await stream.next();
  t.mock.timers.tick(30_000);
  await pinged.opened;
  await stream.close();
});

test("a closed client connects again when it is asked again", async (t) => {
  const client = await clientOf(t, ANSWERS);
  await client.modelPair();
  await client[Symbol.asyncDispose]();
  assert.equal((await client.modelPair()).device, "cpu");
});

for (const target of ["", "http://127.0.0.1:50051", "host:port", "host/path"]) {
  test(`the target ${JSON.stringify(target)} is a mistake`, () => {
    assert.throws(() => connectNode(target), /TypeError.*give host:port/);
  });
}

test("what has a token or a key does not show it when it is printed", async (t) => {
  const client = await clientOf(t, ANSWERS, { token: "secret" });
  assert.ok(!inspect(client, { depth: 10 }).includes("secret"));
});
