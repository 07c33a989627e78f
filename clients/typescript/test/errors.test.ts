import { create } from "@bufbuild/protobuf";
import { Code, ConnectError } from "@connectrpc/connect";
import assert from "node:assert/strict";
import * as http2 from "node:http2";
import type { Socket } from "node:net";
import { test } from "node:test";
import {
  Aborted,
  ErrorReason,
  ErrorReasonSchema,
  GenerateLDAResponseSchema,
  InternalServerError,
  QueueFull,
  RequestRejected,
  ServerAway,
  ValidationFailed,
} from "@lda/client";
import * as lda from "@lda/client";
import { connectNode } from "@lda/client/node";
import { BadRequestSchema, ErrorInfoSchema, RetryInfoSchema } from "../src/gen/google/rpc/error_details_pb.js";
import { clientOf, errorOf, holdUntilCancelled, latch, listen, REQUEST, type Script, started } from "./harness.js";

const EMPTY_MESSAGE = Buffer.alloc(5);

/** A script that refuses every lookup with this error. */
function refuses(error: ConnectError): Script {
  return {
    getModelPair: () => {
      throw error;
    },
  };
}

function withReason(code: Code, reason: string, domain = "lda.v1"): ConnectError {
  return new ConnectError("as the test says", code, undefined, [{ desc: ErrorInfoSchema, value: { reason, domain } }]);
}

const KINDS: [code: Code, reason: keyof typeof ErrorReason, name: string, parents: string[]][] = [
  [Code.InvalidArgument, "VALIDATION_FAILED", "ValidationFailed", ["RequestRejected"]],
  [Code.InvalidArgument, "CONTEXT_EXCEEDED", "ContextExceeded", ["RequestRejected"]],
  [Code.InvalidArgument, "PROMPT_UNUSABLE", "PromptUnusable", ["RequestRejected"]],
  [Code.InvalidArgument, "LIMIT_EXCEEDED", "LimitExceeded", ["RequestRejected"]],
  [Code.FailedPrecondition, "NO_CHAT_TEMPLATE", "NoChatTemplate", ["RequestRejected"]],
  [Code.FailedPrecondition, "TOKENIZERS_INCOMPATIBLE", "TokenizersIncompatible", ["RequestRejected"]],
  [Code.NotFound, "UNKNOWN_GENERATION", "UnknownGeneration", ["RequestRejected"]],
  [Code.Unauthenticated, "UNAUTHENTICATED", "Unauthenticated", ["AccessDenied", "RequestRejected"]],
  [Code.PermissionDenied, "PERMISSION_DENIED", "PermissionDenied", ["AccessDenied", "RequestRejected"]],
  [Code.Unavailable, "LOADING", "Loading", ["Unavailable"]],
  [Code.Unavailable, "DRAINING", "Draining", ["Unavailable"]],
  [Code.Unavailable, "WORKER_DIED", "WorkerDied", ["Unavailable"]],
  [Code.ResourceExhausted, "QUEUE_FULL", "QueueFull", ["Exhausted"]],
  [Code.ResourceExhausted, "CALLER_LIMIT", "CallerLimit", ["Exhausted"]],
  [Code.ResourceExhausted, "SLOW_CONSUMER", "SlowConsumer", ["Exhausted"]],
  [Code.ResourceExhausted, "OUT_OF_MEMORY", "OutOfMemory", ["Exhausted"]],
  [Code.DeadlineExceeded, "DEADLINE_TOO_SHORT", "DeadlineTooShort", ["DeadlineExceeded"]],
  [Code.Aborted, "ABORTED", "Aborted", []],
  [Code.Internal, "INTERNAL", "InternalServerError", []],
];

test("every reason of the contract is in the table below", () => {
  const tested = KINDS.map(([, reason]) => reason).sort();
  const known = ErrorReasonSchema.values.map(({ localName }) => localName).filter((name) => name !== "UNSPECIFIED");
  assert.deepEqual(tested, known.sort());
});

for (const [code, reason, name, parents] of KINDS) {
  test(`reason ${reason} is ${[name, ...parents].join(" < ")}`, async (t) => {
    const client = await clientOf(t, refuses(withReason(code, reason)));
    const error = await errorOf(client.modelPair());
    assert.equal(error.name, name);
    assert.equal(error.reason, reason);
    assert.equal(error.message, "as the test says");
    for (const parent of [...parents, "LdaClientError"]) {
      assert.ok(error instanceof lda[parent as "LdaClientError"], parent);
    }
  });
}

const CODES: [code: Code, grpc: string, name: string][] = [
  [Code.InvalidArgument, "INVALID_ARGUMENT", "RequestRejected"],
  [Code.FailedPrecondition, "FAILED_PRECONDITION", "RequestRejected"],
  [Code.OutOfRange, "OUT_OF_RANGE", "RequestRejected"],
  [Code.NotFound, "NOT_FOUND", "RequestRejected"],
  [Code.AlreadyExists, "ALREADY_EXISTS", "RequestRejected"],
  [Code.Unimplemented, "UNIMPLEMENTED", "RequestRejected"],
  [Code.Unauthenticated, "UNAUTHENTICATED", "AccessDenied"],
  [Code.PermissionDenied, "PERMISSION_DENIED", "AccessDenied"],
  [Code.ResourceExhausted, "RESOURCE_EXHAUSTED", "Exhausted"],
  [Code.DeadlineExceeded, "DEADLINE_EXCEEDED", "DeadlineExceeded"],
  [Code.Aborted, "ABORTED", "Aborted"],
  [Code.Canceled, "CANCELLED", "Aborted"],
  [Code.Internal, "INTERNAL", "InternalServerError"],
  [Code.Unknown, "UNKNOWN", "InternalServerError"],
  [Code.DataLoss, "DATA_LOSS", "InternalServerError"],
];
for (const [code, grpc, name] of CODES) {
  for (const [what, error] of [
    ["no reason", new ConnectError("as the test says", code)],
    ["a reason of a newer server", withReason(code, "NEWER")],
    ["a reason of another domain", withReason(code, "QUEUE_FULL", "elsewhere")],
  ] as const) {
    test(`${grpc} with ${what} is ${name}`, async (t) => {
      const client = await clientOf(t, refuses(error));
      const found = await errorOf(client.modelPair());
      assert.equal(found.name, name);
      assert.equal(found.code, grpc);
      assert.equal(found.reason, what === "a reason of a newer server" ? "NEWER" : undefined);
    });
  }
}

test("UNAVAILABLE with a reason of a newer server is Unavailable, without any reason ServerAway", async (t) => {
  const newer = await clientOf(t, refuses(withReason(Code.Unavailable, "NEWER")));
  assert.equal((await errorOf(newer.modelPair())).name, "Unavailable");
  const bare = await clientOf(t, refuses(new ConnectError("as the test says", Code.Unavailable)));
  assert.equal((await errorOf(bare.modelPair())).name, "ServerAway");
});

test("an error carries metadata, violations and the pause that the server suggests", async (t) => {
  const error = new ConnectError("top_p must be at most 1", Code.InvalidArgument, undefined, [
    { desc: ErrorInfoSchema, value: { domain: "lda.v1", reason: "VALIDATION_FAILED", metadata: { limit: "1" } } },
    {
      desc: BadRequestSchema,
      value: { fieldViolations: [{ field: "sampling.top_p", description: "must be at most 1" }] },
    },
    { desc: RetryInfoSchema, value: { retryDelay: { seconds: 2n, nanos: 500_000_000 } } },
  ]);
  const client = await clientOf(t, refuses(error));
  const found = await errorOf(client.modelPair());
  assert.ok(found instanceof ValidationFailed);
  assert.deepEqual(found.metadata, { limit: "1" });
  assert.deepEqual(found.violations, [{ field: "sampling.top_p", description: "must be at most 1" }]);
  assert.equal(found.retryAfterS, 2.5);
});

test("an error in the middle of a stream comes after the events before it", async (t) => {
  const client = await clientOf(t, {
    async *generateLDA() {
      yield create(GenerateLDAResponseSchema, started());
      throw withReason(Code.ResourceExhausted, "QUEUE_FULL");
    },
  });
  const stream = client.generate(REQUEST);
  assert.equal((await stream.next()).done, false);
  assert.ok((await errorOf(stream.next())) instanceof QueueFull);
  assert.deepEqual(await stream.next(), { done: true, value: undefined });
});

test("details that cannot be read leave the code and the message", async (t) => {
  const server = http2.createServer();
  server.on("stream", (stream) => {
    stream.respond(
      {
        ":status": 200,
        "content-type": "application/grpc",
        "grpc-status": "3",
        "grpc-message": "not%20so",
        "grpc-status-details-bin": "//8",
      },
      { endStream: true },
    );
  });
  const client = connectNode(await listen(t, server));
  t.after(() => client.close());
  const error = await errorOf(client.modelPair());
  assert.equal(error.name, "RequestRejected");
  assert.ok(error instanceof RequestRejected);
  assert.equal(error.code, "INVALID_ARGUMENT");
  assert.equal(error.message, "not so");
});

test("a server that answers without gRPC is an InternalServerError, not a success", async (t) => {
  const server = http2.createServer((_, response) => response.end("<html>"));
  const client = connectNode(await listen(t, server));
  t.after(() => client.close());
  assert.ok((await errorOf(client.modelPair())) instanceof InternalServerError);
});

test("nobody at the target is ServerAway, which names the target and the remedy", async (t) => {
  const server = http2.createServer();
  const target = await listen(t, server);
  server.close();
  const error = await errorOf(connectNode(target).modelPair());
  assert.ok(error instanceof ServerAway);
  assert.equal(error.code, "UNAVAILABLE");
  assert.match(error.message, new RegExp(`No LDA server answers at ${target} .*lda-service serve`));
});

test("a connection that breaks in the middle of a stream is ServerAway", async (t) => {
  const sockets: Socket[] = [];
  const server = http2.createServer();
  server.on("connection", (socket: Socket) => sockets.push(socket));
  server.on("stream", (stream) => {
    stream.on("error", () => {});
    stream.respond({ ":status": 200, "content-type": "application/grpc" });
    stream.write(EMPTY_MESSAGE, () => sockets.forEach((socket) => socket.destroy()));
  });
  const client = connectNode(await listen(t, server));
  t.after(() => client.close());
  const error = await errorOf(client.complete(REQUEST));
  assert.ok(error instanceof ServerAway);
  assert.equal(error.code, "UNAVAILABLE");
  assert.match(error.message, /was lost before the answer was complete/);
});

test("closing the client ends its calls with Aborted: that is no fault of the server", async (t) => {
  const client = await clientOf(t, {
    async *generateLDA(_, context) {
      yield create(GenerateLDAResponseSchema, started());
      await holdUntilCancelled(context, latch());
    },
  });
  const stream = client.generate(REQUEST);
  await stream.next();
  const waiting = errorOf(stream.next());
  client.close();
  const error = await waiting;
  assert.ok(error instanceof Aborted);
  assert.equal(error.message, "The client was closed.");
});
