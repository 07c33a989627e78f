/** A real HTTP/2 server in this process that plays what a test tells it to, and a client of it. */
import { create, type MessageInitShape } from "@bufbuild/protobuf";
import { Code, ConnectError, type HandlerContext, type ServiceImpl } from "@connectrpc/connect";
import { connectNodeAdapter } from "@connectrpc/connect-node";
import { GenerateLDAResponseSchema, LdaClient, LdaClientError, LdaService, text } from "@lda/client";
import { connectNode, type NodeOptions } from "@lda/client/node";
import { once } from "node:events";
import * as http2 from "node:http2";
import type { AddressInfo } from "node:net";
import type { TestContext } from "node:test";

export type Script = Partial<ServiceImpl<typeof LdaService>>;
export type EventInit = MessageInitShape<typeof GenerateLDAResponseSchema>;

export const REQUEST = { prompt: text("hi") };

/** Listen on a free port until the test ends; the target. */
export async function listen(t: TestContext, server: http2.Http2Server): Promise<string> {
  const sessions = new Set<http2.ServerHttp2Session>();
  server.on("session", (session) => sessions.add(session));
  server.listen(0, "127.0.0.1");
  await once(server, "listening");
  t.after(() => {
    sessions.forEach((session) => session.destroy());
    server.close();
  });
  return `127.0.0.1:${(server.address() as AddressInfo).port}`;
}

/** What answers the requests of a server as the script says. */
export function handlerOf(script: Script): ReturnType<typeof connectNodeAdapter> {
  return connectNodeAdapter({ routes: (router) => void router.service(LdaService, script) });
}

/** Serve the script. */
export async function serve(t: TestContext, script: Script): Promise<string> {
  return await listen(t, http2.createServer(handlerOf(script)));
}

/** Serve the script and make a client of it. */
export async function clientOf(t: TestContext, script: Script, options?: NodeOptions): Promise<LdaClient> {
  const client = connectNode(await serve(t, script), options);
  t.after(() => client.close());
  return client;
}

/** A handler of `GenerateLDA` that plays these events. */
export function plays(events: readonly EventInit[]) {
  return async function* () {
    for (const event of events) yield create(GenerateLDAResponseSchema, event);
  };
}

export function started(fields: { sequenceCount?: number; seed?: bigint } = {}): EventInit {
  return { event: { case: "started", value: { generationId: "g-1", sequenceCount: 1, ...fields } } };
}

export function delta(text: string, sequenceIndex = 0, pieces: readonly Uint8Array[] = []): EventInit {
  const tokens = pieces.map((piece, id) => ({ id, piece }));
  return { event: { case: "delta", value: { text, sequenceIndex, tokens } } };
}

export function finished(sequenceIndex = 0): EventInit {
  return { event: { case: "finished", value: { sequenceIndex } } };
}

/** A promise that a handler settles, and a way to be told when its call is cancelled. */
export function latch(): { readonly opened: Promise<void>; readonly open: () => void } {
  let open = () => {};
  const opened = new Promise<void>((resolve) => (open = resolve));
  return { opened, open };
}

/** Stay silent until the call is cancelled, then open the latch. */
export async function holdUntilCancelled(context: HandlerContext, cancelled: { open: () => void }): Promise<never> {
  await new Promise<void>((resolve) => context.signal.addEventListener("abort", () => resolve()));
  cancelled.open();
  throw new ConnectError("cancelled", Code.Canceled);
}

/** The error that a promise is rejected with. */
export async function errorOf(promise: Promise<unknown>): Promise<LdaClientError> {
  const outcome = await promise.then(
    (value) => value,
    (error: unknown) => error,
  );
  if (outcome instanceof LdaClientError) return outcome;
  throw new Error("expected an LdaClientError", { cause: outcome });
}
