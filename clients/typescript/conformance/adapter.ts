/**
 * The adapter of this client: one call a line on standard input, one answer a line on standard output, both JSON.
 * clients/conformance/README.md describes the protocol.
 */
import { type DescMessage, fromJson, type JsonValue, type MessageShape, toJson } from "@bufbuild/protobuf";
import {
  type CallOptions,
  type Completion,
  type EventStream,
  FinishReasonSchema,
  GenerateBothRequestSchema,
  GenerateBothResponseSchema,
  GenerateLDARequestSchema,
  GenerateLDAResponseSchema,
  GetModelPairResponseSchema,
  type LdaClient,
  LdaClientError,
  ModelRoleSchema,
  ScoreRequestSchema,
  ScoreResponseSchema,
  TokenizerCompatResponseSchema,
} from "@lda/client";
import { connectNode, type NodeOptions } from "@lda/client/node";
import { readFileSync } from "node:fs";
import { createInterface } from "node:readline";

interface AdapterCall {
  readonly id: string;
  readonly target: string;
  readonly verb: string;
  readonly request?: JsonValue;
  readonly timeoutMs?: number;
  readonly token?: string;
  readonly tls?: { readonly ca?: string; readonly certificate?: string; readonly key?: string };
  readonly cancelAfter?: number;
}

interface Answer {
  ended: "ok" | "cancelled" | "error";
  events: JsonValue[];
  result: JsonValue;
  error: JsonValue;
}

type Verb = (client: LdaClient, call: AdapterCall, options: CallOptions, answer: Answer) => Promise<void>;

const VERBS: Readonly<Record<string, Verb>> = {
  async generate(client, call, options, answer) {
    const request = fromJson(GenerateLDARequestSchema, call.request ?? {});
    await read(client.generate(request, options), GenerateLDAResponseSchema, call, answer);
  },
  async generateBoth(client, call, options, answer) {
    const request = fromJson(GenerateBothRequestSchema, call.request ?? {});
    await read(client.generateBoth(request, options), GenerateBothResponseSchema, call, answer);
  },
  async score(client, call, options, answer) {
    const request = fromJson(ScoreRequestSchema, call.request ?? {});
    await read(client.score(request, options), ScoreResponseSchema, call, answer);
  },
  async complete(client, call, options, answer) {
    const request = fromJson(GenerateLDARequestSchema, call.request ?? {});
    answer.result = (await client.complete(request, options)).map(completionJson);
  },
  async tokenizerCompat(client, _call, options, answer) {
    answer.result = toJson(TokenizerCompatResponseSchema, await client.tokenizerCompat(options));
  },
  async modelPair(client, _call, options, answer) {
    answer.result = toJson(GetModelPairResponseSchema, await client.modelPair(options));
  },
};

async function read<Desc extends DescMessage>(
  stream: EventStream<MessageShape<Desc>, unknown>,
  schema: Desc,
  { cancelAfter }: AdapterCall,
  answer: Answer,
): Promise<void> {
  for await (const event of stream) {
    answer.events.push(toJson(schema, event));
    if (answer.events.length === cancelAfter) {
      answer.ended = "cancelled";
      break;
    }
  }
}

function completionJson({ sequenceIndex, role, text, tokens, reason, matchedStop, seed }: Completion): JsonValue {
  return {
    sequenceIndex,
    role: ModelRoleSchema.value[role]?.name ?? role,
    text,
    tokenIds: tokens.map((token) => token.id),
    reason: FinishReasonSchema.value[reason]?.name ?? reason,
    stopString: typeof matchedStop === "string" ? matchedStop : "",
    seed: String(seed),
  };
}

function errorJson(error: LdaClientError): JsonValue {
  return {
    class: error.name,
    code: error.code ?? null,
    reason: error.reason ?? null,
    message: error.message,
    metadata: { ...error.metadata },
    violations: error.violations.map(({ field, description }) => ({ field, description })),
    retryAfterS: error.retryAfterS ?? null,
  };
}

const clients = new Map<string, LdaClient>();

/** The client of a call; kept open between calls, as a program would. */
function clientOf({ target, token, tls }: AdapterCall): LdaClient {
  const key = JSON.stringify([target, token, tls]);
  const client = clients.get(key) ?? connectNode(target, { token, tls: tls && readTls(tls) });
  clients.set(key, client);
  return client;
}

function readTls({ ca, certificate, key }: NonNullable<AdapterCall["tls"]>): NodeOptions["tls"] {
  const read = (path?: string) => path && readFileSync(path, "utf8");
  return { ca: read(ca), certificate: read(certificate), key: read(key) };
}

async function answerTo(call: AdapterCall): Promise<object> {
  const verb = VERBS[call.verb];
  if (verb === undefined) return { unsupported: `there is no verb ${call.verb}` };
  const answer: Answer = { ended: "ok", events: [], result: null, error: null };
  try {
    await verb(clientOf(call), call, { timeoutMs: call.timeoutMs }, answer);
  } catch (error) {
    if (!(error instanceof LdaClientError)) return { unsupported: String(error) };
    Object.assign(answer, { ended: "error", error: errorJson(error) });
  }
  return answer;
}

for await (const line of createInterface({ input: process.stdin })) {
  const call = JSON.parse(line) as AdapterCall;
  console.log(JSON.stringify({ id: call.id, ...(await answerTo(call)) }));
}
for (const client of clients.values()) client.close();
