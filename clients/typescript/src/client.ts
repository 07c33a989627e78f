/** `LdaClient`: the verbs of the service, over any transport of connect-es. */
import { create, type DescMessage, type MessageInitShape, type MessageShape, toBinary } from "@bufbuild/protobuf";
import { type Client, createClient, type Transport } from "@connectrpc/connect";
import { type Attempt, Call, type CallContext, type CallOptions } from "./call.js";
import { StreamBroken } from "./errors.js";
import { type Completion, GenerateReader, ScoreReader } from "./gather.js";
import {
  type GenerateBothRequest,
  GenerateBothRequestSchema,
  type GenerateBothResponse,
  type GenerateLDARequest,
  GenerateLDARequestSchema,
  type GenerateLDAResponse,
  type GetLoadResponse,
  type GetModelPairResponse,
  LdaService,
  type ScoreRequest,
  ScoreRequestSchema,
  type TokenizerCompatResponse,
} from "./gen/lda/v1/lda_service_pb.js";
import { GenerateStream, ScoreStream } from "./stream.js";

/** A request as the contract has it: a message, or an object with some of its fields. */
export type GenerateInit = MessageInitShape<typeof GenerateLDARequestSchema>;
export type GenerateBothInit = MessageInitShape<typeof GenerateBothRequestSchema>;
export type ScoreInit = MessageInitShape<typeof ScoreRequestSchema>;

/** How a client makes its calls. */
export interface ClientOptions {
  /** Bearer token, sent with every call. */
  readonly token?: string | undefined;
  /** Deadline of `generate`, `generateBoth`, `score` and `complete` in milliseconds; none unless given. */
  readonly timeoutMs?: number | undefined;
  /** Deadline of the short calls in milliseconds; 30 s unless given. */
  readonly lookupTimeoutMs?: number | undefined;
}

/** The transport of a client, where it leads, and how to close it. */
export interface Connection {
  readonly transport: Transport;
  /** The address, for messages of errors. */
  readonly target: string;
  readonly close?: () => void;
}

const LOOKUP_TIMEOUT_MS = 30_000;

/**
 * Client of one LDA server. `connectNode` and `connectWeb` make one.
 *
 * Fields of a request that are left out take the defaults of the server, which `modelPair` reports.
 */
export class LdaClient implements AsyncDisposable {
  readonly #service: Client<typeof LdaService>;
  readonly #connection: Connection;
  readonly #context: CallContext;
  readonly #options: ClientOptions;

  constructor(connection: Connection, options: ClientOptions = {}) {
    this.#service = createClient(LdaService, connection.transport);
    this.#connection = connection;
    this.#context = { target: connection.target, headers: headers(options.token) };
    this.#options = options;
  }

  /** Stream text sampled from `after + alpha * (after - before)`. */
  generate(request: GenerateInit, options: CallOptions = {}): GenerateStream<GenerateLDAResponse> {
    const message: GenerateLDARequest = checked(GenerateLDARequestSchema, request);
    const call = this.#stream((connect) => this.#service.generateLDA(message, connect), options);
    return new GenerateStream(call, new GenerateReader(1, message.output?.scoreAlphas));
  }

  /** Stream text sampled from each model on its own; `role` tells them apart. */
  generateBoth(request: GenerateBothInit, options: CallOptions = {}): GenerateStream<GenerateBothResponse> {
    const message: GenerateBothRequest = checked(GenerateBothRequestSchema, request);
    const call = this.#stream((connect) => this.#service.generateBoth(message, connect), options);
    return new GenerateStream(call, new GenerateReader(2, message.output?.scoreAlphas));
  }

  /** Teacher-force a continuation through both models: a stream of blocks, `gather()` for the whole. */
  score(request: ScoreInit, options: CallOptions = {}): ScoreStream {
    const message: ScoreRequest = checked(ScoreRequestSchema, request);
    const call = this.#stream((connect) => this.#service.score(message, connect), options);
    return new ScoreStream(call, new ScoreReader(message.scoreAlphas));
  }

  /** Generate, and return the finished sequences in the order in which they finished. */
  async complete(request: GenerateInit, options: CallOptions = {}): Promise<Completion[]> {
    return await this.generate(request, options).gather();
  }

  /** Whether the two tokenizers can be used as one pair, with the evidence. */
  async tokenizerCompat(options: CallOptions = {}): Promise<TokenizerCompatResponse> {
    return await this.#lookup((connect) => this.#service.tokenizerCompat({}, connect), options);
  }

  /** The loaded pair, the limits in force and the defaults of the server. */
  async modelPair(options: CallOptions = {}): Promise<GetModelPairResponse> {
    return await this.#lookup((connect) => this.#service.getModelPair({}, connect), options);
  }

  /** How busy the server is. */
  async load(options: CallOptions = {}): Promise<GetLoadResponse> {
    return await this.#lookup((connect) => this.#service.getLoad({}, connect), options);
  }

  /** Close the connection; calls under way are cancelled. A later call connects again. */
  close(): void {
    this.#connection.close?.();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.close();
  }

  #stream<E>(attempt: Attempt<E>, options: CallOptions): Call<E> {
    const timeoutMs = options.timeoutMs ?? this.#options.timeoutMs;
    return new Call(attempt, this.#context, { ...options, timeoutMs });
  }

  async #lookup<R>(ask: (options: ConnectOptions) => Promise<R>, options: CallOptions): Promise<R> {
    const timeoutMs = options.timeoutMs ?? this.#options.lookupTimeoutMs ?? LOOKUP_TIMEOUT_MS;
    const call = new Call((connect) => once(ask(connect)), this.#context, { ...options, timeoutMs });
    for await (const answer of call.messages()) return answer;
    throw new StreamBroken("The server ended the call with OK, but without an answer.");
  }
}

type ConnectOptions = Parameters<Attempt<unknown>>[0];

function headers(token: string | undefined): Record<string, string> {
  return token === undefined ? {} : { authorization: `Bearer ${token}` };
}

async function* once<R>(answer: Promise<R>): AsyncGenerator<R, void, undefined> {
  yield await answer;
}

/** The message of a request. Throws `TypeError` for one that cannot be sent, before any call is made. */
function checked<Desc extends DescMessage>(schema: Desc, request: MessageInitShape<Desc>): MessageShape<Desc> {
  try {
    const message = create(schema, request);
    toBinary(schema, message);
    return message;
  } catch (error) {
    throw new TypeError(`The request does not fit the contract: ${(error as Error).message}`, { cause: error });
  }
}
