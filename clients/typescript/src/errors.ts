/**
 * Every error that a call raises, and the tables that make them from a gRPC status.
 *
 *     LdaClientError
 *       RequestRejected           the request cannot be served as it stands; change it
 *         ValidationFailed          a field breaks a rule of the contract; `violations` names it
 *         ContextExceeded           prompt and output do not fit the context window
 *         PromptUnusable            the prompt renders to nothing, or holds ids outside the shared vocabulary
 *         NoChatTemplate            a conversation was sent to a pair without a chat template
 *         LimitExceeded             legal, but above a limit of this server
 *         TokenizersIncompatible    the two vocabularies do not match
 *         UnknownGeneration         no generation of this id is open
 *         AccessDenied              the server does not know this caller, or does not let it do this
 *           Unauthenticated           no token, an unknown or an expired one
 *           PermissionDenied          the token or certificate does not allow this method
 *       Unavailable               nothing is wrong with the request; try again later or elsewhere
 *         Loading                   the models are still being loaded or warmed up
 *         Draining                  the server is shutting down
 *         WorkerDied                the process that owns the models died
 *         ServerAway                nobody answers at the target, or the connection broke
 *       Exhausted                 something ran out
 *         QueueFull                 as many requests wait as may wait
 *         CallerLimit               this caller has as many requests open as it may
 *         SlowConsumer              the stream was read too slowly
 *         OutOfMemory               device memory ran out while serving the request
 *       DeadlineExceeded          `timeoutMs` went by
 *         DeadlineTooShort          refused at once: the wait would have been longer
 *       Aborted                   an operator, a shutdown or the caller's own `signal` ended the call
 *       InternalServerError       a fault of the server
 *       StreamBroken              the stream ended or went on against the contract
 *
 * A bad argument that never leaves this process is an ordinary `TypeError` or `RangeError`.
 */
import { Code, ConnectError } from "@connectrpc/connect";
import { BadRequestSchema, ErrorInfoSchema, RetryInfoSchema } from "./gen/google/rpc/error_details_pb.js";

const ERROR_DOMAIN = "lda.v1";

/** One field that breaks a rule: its path, such as `sampling.top_p`, and the rule in words. */
export interface Violation {
  readonly field: string;
  readonly description: string;
}

/** What an error knows besides its message. */
export interface ErrorFacts {
  /** Name of the gRPC code, such as `RESOURCE_EXHAUSTED`; left out where no status was received. */
  readonly code?: string;
  /** Name of the `ErrorReason` without its prefix, such as `QUEUE_FULL`. */
  readonly reason?: string;
  /** The facts that the contract documents for the reason. */
  readonly metadata?: Readonly<Record<string, string>>;
  readonly violations?: readonly Violation[];
  readonly retryAfterS?: number;
  readonly cause?: unknown;
}

/** Base of all errors of this client. */
export class LdaClientError extends Error {
  /** Name of the gRPC code, such as `RESOURCE_EXHAUSTED`; undefined where no status was received. */
  readonly code: string | undefined;
  /** Name of the `ErrorReason` without its prefix, such as `QUEUE_FULL`; undefined where none was given. */
  readonly reason: string | undefined;
  /** The facts that the contract documents for the reason. */
  readonly metadata: Readonly<Record<string, string>>;
  /** Fields at fault, for `ValidationFailed`; else empty. */
  readonly violations: readonly Violation[];
  /** Seconds after which the server suggests to try again; undefined where it does not. */
  readonly retryAfterS: number | undefined;

  constructor(message: string, facts: ErrorFacts = {}) {
    super(message, { cause: facts.cause });
    this.name = new.target.name;
    this.code = facts.code;
    this.reason = facts.reason;
    this.metadata = facts.metadata ?? {};
    this.violations = facts.violations ?? [];
    this.retryAfterS = facts.retryAfterS;
  }
}

/** The request cannot be served as it stands; change it before trying again. */
export class RequestRejected extends LdaClientError {}
/** A field breaks a rule of the contract; `violations` holds its path and the rule. */
export class ValidationFailed extends RequestRejected {}
/** Prompt and output do not fit the context window. Metadata: `prompt_tokens`, `max_new_tokens`, `limit`. */
export class ContextExceeded extends RequestRejected {}
/** The prompt renders to no tokens, or holds ids outside the shared vocabulary. Metadata: `token_id`. */
export class PromptUnusable extends RequestRejected {}
/** A conversation was sent to a pair without a chat template; send text or token ids. */
export class NoChatTemplate extends RequestRejected {}
/** A value is legal but above a limit of this server. Metadata: `field`, `limit`. */
export class LimitExceeded extends RequestRejected {}
/** The two vocabularies do not match; `tokenizerCompat` says where. */
export class TokenizersIncompatible extends RequestRejected {}
/** No generation of this id is open on this server. Metadata: `generation_id`. */
export class UnknownGeneration extends RequestRejected {}
/** The bearer token or client certificate is missing, wrong, or without the right to this call. */
export class AccessDenied extends RequestRejected {}
/** The call carries no token, or one that is unknown or expired. */
export class Unauthenticated extends AccessDenied {}
/** The token or certificate does not allow this method. Metadata: `scope`, where one is missing. */
export class PermissionDenied extends AccessDenied {}

/** Nothing is wrong with the request; try again later or at another server. */
export class Unavailable extends LdaClientError {}
/** The models are still being loaded or warmed up. */
export class Loading extends Unavailable {}
/** The server is shutting down and takes no new work. */
export class Draining extends Unavailable {}
/** The process that owns the models died; a fresh one is being started. */
export class WorkerDied extends Unavailable {}
/** Nobody answers at the target, or the connection to it was lost. */
export class ServerAway extends Unavailable {}

/** Something ran out: room in the queue, patience with a slow reader, or memory. */
export class Exhausted extends LdaClientError {}
/** As many requests wait as may wait. Metadata: `depth`, `capacity`. */
export class QueueFull extends Exhausted {}
/** This caller has as many requests open as one caller may. Metadata: `open`, `limit`. */
export class CallerLimit extends Exhausted {}
/** The stream was read too slowly and the server ended it. Metadata: `buffered_tokens`. */
export class SlowConsumer extends Exhausted {}
/** Device memory ran out while serving this request. */
export class OutOfMemory extends Exhausted {}

/** The deadline of the call, `timeoutMs`, went by. `timeBudget` ends a sequence early without an error. */
export class DeadlineExceeded extends LdaClientError {}
/** Refused at once: the expected wait is longer than the deadline. Metadata: `expected_wait_ms`, `remaining_ms`. */
export class DeadlineTooShort extends DeadlineExceeded {}

/** An operator, a shutdown or the caller's own `signal` ended the call. */
export class Aborted extends LdaClientError {}
/** A fault of the server; its log holds more under the same id. Metadata: `request_id`. */
export class InternalServerError extends LdaClientError {}
/** The stream ended or went on against the contract, such as an OK end before every sequence had finished. */
export class StreamBroken extends LdaClientError {}

type ErrorClass = new (message: string, facts?: ErrorFacts) => LdaClientError;

/** The class of each reason of the contract. */
const ERRORS_BY_REASON: ReadonlyMap<string, ErrorClass> = new Map<string, ErrorClass>([
  ["VALIDATION_FAILED", ValidationFailed],
  ["CONTEXT_EXCEEDED", ContextExceeded],
  ["PROMPT_UNUSABLE", PromptUnusable],
  ["NO_CHAT_TEMPLATE", NoChatTemplate],
  ["TOKENIZERS_INCOMPATIBLE", TokenizersIncompatible],
  ["LIMIT_EXCEEDED", LimitExceeded],
  ["QUEUE_FULL", QueueFull],
  ["SLOW_CONSUMER", SlowConsumer],
  ["LOADING", Loading],
  ["DRAINING", Draining],
  ["WORKER_DIED", WorkerDied],
  ["OUT_OF_MEMORY", OutOfMemory],
  ["ABORTED", Aborted],
  ["INTERNAL", InternalServerError],
  ["DEADLINE_TOO_SHORT", DeadlineTooShort],
  ["CALLER_LIMIT", CallerLimit],
  ["UNAUTHENTICATED", Unauthenticated],
  ["PERMISSION_DENIED", PermissionDenied],
  ["UNKNOWN_GENERATION", UnknownGeneration],
]);

/** For a status without a reason we know: one made by gRPC itself, a proxy, or a newer server. */
const ERRORS_BY_CODE: ReadonlyMap<Code, ErrorClass> = new Map<Code, ErrorClass>([
  [Code.InvalidArgument, RequestRejected],
  [Code.FailedPrecondition, RequestRejected],
  [Code.OutOfRange, RequestRejected],
  [Code.NotFound, RequestRejected],
  [Code.AlreadyExists, RequestRejected],
  [Code.Unimplemented, RequestRejected],
  [Code.Unauthenticated, AccessDenied],
  [Code.PermissionDenied, AccessDenied],
  [Code.Unavailable, Unavailable],
  [Code.ResourceExhausted, Exhausted],
  [Code.DeadlineExceeded, DeadlineExceeded],
  [Code.Aborted, Aborted],
  [Code.Canceled, Aborted],
  [Code.Internal, InternalServerError],
  [Code.Unknown, InternalServerError],
  [Code.DataLoss, InternalServerError],
]);

/**
 * Turn what a call threw into its class.
 *
 * @param target the address called, for the message.
 * @param answered whether the server had begun to answer, so that the connection was lost and not refused.
 */
export function errorFrom(thrown: unknown, target: string, answered: boolean): LdaClientError {
  if (thrown instanceof LdaClientError) return thrown;
  const error = ConnectError.from(thrown);
  const code = connectionLost(error) ? Code.Unavailable : error.code;
  const facts = { ...detailsOf(error), code: codeName(code), cause: thrown };
  if (code === Code.Unavailable && facts.reason === undefined) {
    return new ServerAway(awayMessage(error.rawMessage, target, answered), facts);
  }
  const kind = ERRORS_BY_REASON.get(facts.reason ?? "") ?? ERRORS_BY_CODE.get(code) ?? LdaClientError;
  return new kind(error.rawMessage || facts.code, facts);
}

/** Codes under which connect-es reports what happened to sockets, TLS and `fetch`. */
const CONNECTION_CODES: ReadonlySet<Code> = new Set([Code.Unknown, Code.Internal, Code.Aborted, Code.Canceled]);

/**
 * Whether this error stands for a connection that did not come up or broke, which every gRPC library calls
 * UNAVAILABLE. Node resets the streams of a lost connection with CANCEL; that is never our own, since whoever leaves a
 * stream does not ask how it ended.
 */
function connectionLost(error: ConnectError): boolean {
  if (error.metadata.has("grpc-status") || !CONNECTION_CODES.has(error.code)) return false;
  return error.cause instanceof Error || /closed with error code CANCEL|missing (status|trailer)/.test(error.message);
}

function awayMessage(cause: string, target: string, answered: boolean): string {
  if (answered) return `The connection to ${target} was lost before the answer was complete (${cause}).`;
  return (
    `No LDA server answers at ${target} (${cause.trim()}): ` +
    "start one with `lda-service serve`, or give another target."
  );
}

/** The name that gRPC gives to a code. */
function codeName(code: Code): string {
  if (code === Code.Canceled) return "CANCELLED";
  return Code[code].replace(/(?<=[a-z])(?=[A-Z])/g, "_").toUpperCase();
}

function detailsOf(error: ConnectError): ErrorFacts {
  const info = error.findDetails(ErrorInfoSchema).find((each) => each.domain === ERROR_DOMAIN);
  const [badRequest] = error.findDetails(BadRequestSchema);
  const delay = error.findDetails(RetryInfoSchema)[0]?.retryDelay;
  return {
    reason: info?.reason || undefined,
    metadata: info?.metadata,
    violations: badRequest?.fieldViolations.map(({ field, description }) => ({ field, description })),
    retryAfterS: delay && Number(delay.seconds) + delay.nanos / 1e9,
  };
}
