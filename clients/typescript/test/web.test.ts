import { create } from "@bufbuild/protobuf";
import { Code, ConnectError } from "@connectrpc/connect";
import { DeadlineExceeded, GenerateLDAResponseSchema, QueueFull, ServerAway, StreamBroken } from "@lda/client";
import { connectWeb } from "@lda/client/web";
import assert from "node:assert/strict";
import { once } from "node:events";
import * as http from "node:http";
import type { AddressInfo } from "node:net";
import { test, type TestContext } from "node:test";
import { ErrorInfoSchema } from "../src/gen/google/rpc/error_details_pb.js";
import {
  delta,
  errorOf,
  finished,
  handlerOf,
  holdUntilCancelled,
  latch,
  plays,
  REQUEST,
  type Script,
  started,
} from "./harness.js";

/** A client over gRPC-Web and HTTP/1.1, as a browser has it. */
async function webClientOf(t: TestContext, script: Script, options?: Parameters<typeof connectWeb>[1]) {
  const server = http.createServer(handlerOf(script)).listen(0, "127.0.0.1");
  await once(server, "listening");
  t.after(() => {
    server.closeAllConnections();
    server.close();
  });
  return connectWeb(`http://127.0.0.1:${(server.address() as AddressInfo).port}`, options);
}

test("over gRPC-Web, streams and short calls answer", async (t) => {
  const client = await webClientOf(t, {
    generateLDA: plays([started(), delta("héllo "), delta("🙂"), finished()]),
    getModelPair: (_, { requestHeader }) => ({ device: requestHeader.get("authorization") ?? "" }),
  });
  const [completion] = await client.complete(REQUEST);
  assert.equal(completion?.text, "héllo 🙂");
  const known = await webClientOf(
    t,
    {
      getModelPair: (_, { requestHeader }) => ({ device: requestHeader.get("authorization") ?? "" }),
    },
    { token: "secret" },
  );
  assert.equal((await known.modelPair()).device, "Bearer secret");
});

test("over gRPC-Web, an error keeps its class", async (t) => {
  const client = await webClientOf(t, {
    async *generateLDA() {
      yield create(GenerateLDAResponseSchema, started());
      throw new ConnectError("as the test says", Code.ResourceExhausted, undefined, [
        { desc: ErrorInfoSchema, value: { domain: "lda.v1", reason: "QUEUE_FULL" } },
      ]);
    },
  });
  assert.ok((await errorOf(client.complete(REQUEST))) instanceof QueueFull);
});

test("over gRPC-Web, leaving the loop cancels the call on the server", async (t) => {
  const cancelled = latch();
  const client = await webClientOf(t, {
    async *generateLDA(_, context) {
      yield create(GenerateLDAResponseSchema, started());
      yield create(GenerateLDAResponseSchema, delta("a"));
      await holdUntilCancelled(context, cancelled);
    },
  });
  for await (const piece of client.generate(REQUEST).text()) if (piece.text) break;
  await cancelled.opened;
});

test("over gRPC-Web, the deadline and the grammar hold", async (t) => {
  const holding = await webClientOf(t, {
    async *generateLDA(_, context) {
      yield create(GenerateLDAResponseSchema, started());
      await holdUntilCancelled(context, latch());
    },
  });
  assert.ok((await errorOf(holding.complete(REQUEST, { timeoutMs: 100 }))) instanceof DeadlineExceeded);
  const broken = await webClientOf(t, { generateLDA: plays([started()]) });
  assert.ok((await errorOf(broken.complete(REQUEST))) instanceof StreamBroken);
});

test("over gRPC-Web, a proxy that is away is ServerAway, after four attempts", async () => {
  let attempts = 0;
  const client = connectWeb("http://127.0.0.1:1", {
    fetch: () => {
      attempts++;
      return Promise.reject(new TypeError("Failed to fetch"));
    },
  });
  assert.ok((await errorOf(client.modelPair())) instanceof ServerAway);
  assert.equal(attempts, 4);
});

test("over gRPC-Web, a body that is cut off is ServerAway", async (t) => {
  const server = http.createServer((_, response) => {
    response.writeHead(200, { "content-type": "application/grpc-web+proto" });
    response.write(Buffer.alloc(5), () => response.destroy());
  });
  server.listen(0, "127.0.0.1");
  await once(server, "listening");
  t.after(() => server.close());
  const client = connectWeb(`http://127.0.0.1:${(server.address() as AddressInfo).port}`);
  assert.ok((await errorOf(client.complete(REQUEST))) instanceof ServerAway);
});
