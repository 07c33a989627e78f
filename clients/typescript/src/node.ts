/** `connectNode`: a client over gRPC, for Node. */
import { Code, ConnectError, decodeBinaryHeader } from "@connectrpc/connect";
import { createGrpcTransport, Http2SessionManager } from "@connectrpc/connect-node";
import type {
  ClientHttp2Stream,
  IncomingHttpHeaders,
  OutgoingHttpHeaders,
  SecureClientSessionOptions,
} from "node:http2";
import { type ClientOptions, LdaClient } from "./client.js";
import { StatusSchema } from "./gen/google/rpc/status_pb.js";

const MESSAGE_BYTES_MAX = 20 << 20;
const DETAILS_KEY = "grpc-status-details-bin";
/** Pings while a call is open, so that a dead peer is noticed during a long silent prefill. */
const KEEPALIVE = { pingIntervalMs: 30_000, pingTimeoutMs: 10_000, pingIdleConnection: false };

/** What a client shows and trusts over TLS. Each is PEM text; `{}` trusts the authorities that Node knows. */
export interface TlsOptions {
  /** Authorities that the certificate of the server may come from. */
  readonly ca?: string | Uint8Array | undefined;
  /** Our own certificate, for servers that ask for one. */
  readonly certificate?: string | Uint8Array | undefined;
  /** The key of `certificate`. */
  readonly key?: string | Uint8Array | undefined;
  /** The name that the certificate of the server must bear, if it is not that of the target. */
  readonly serverName?: string | undefined;
}

export interface NodeOptions extends ClientOptions {
  /** Encrypt the connection; plain text unless given. */
  readonly tls?: TlsOptions | undefined;
}

/** Make a client of the server at `target`, which is `host:port`. It connects at the first call. */
export function connectNode(target: string, options: NodeOptions = {}): LdaClient {
  const baseUrl = baseUrlOf(target, options.tls !== undefined);
  const sessionManager = new Sessions(baseUrl, KEEPALIVE, options.tls && sessionOptions(options.tls));
  const transport = createGrpcTransport({
    baseUrl,
    sessionManager,
    readMaxBytes: MESSAGE_BYTES_MAX,
    writeMaxBytes: MESSAGE_BYTES_MAX,
  });
  const close = () => sessionManager.abort(new ConnectError("The client was closed.", Code.Canceled));
  return new LdaClient({ transport, target, close }, options);
}

/** Connections that drop the details of a status if they cannot be read: connect-es would lose the status with them. */
class Sessions extends Http2SessionManager {
  override async request(
    method: string,
    path: string,
    headers: OutgoingHttpHeaders,
    options: object,
  ): Promise<ClientHttp2Stream> {
    const stream = await super.request(method, path, headers, options);
    return stream.on("response", dropUnreadableDetails).on("trailers", dropUnreadableDetails);
  }
}

function dropUnreadableDetails(headers: IncomingHttpHeaders): void {
  try {
    decodeBinaryHeader(String(headers[DETAILS_KEY] ?? ""), StatusSchema);
  } catch {
    delete headers[DETAILS_KEY];
  }
}

function baseUrlOf(target: string, secure: boolean): string {
  const url = `${secure ? "https" : "http"}://${target}`;
  if (target.includes("/") || !URL.canParse(url)) {
    throw new TypeError(`The target is ${JSON.stringify(target)}; give host:port, such as 127.0.0.1:50051.`);
  }
  return url;
}

function sessionOptions({ ca, certificate, key, serverName }: TlsOptions): SecureClientSessionOptions {
  return {
    ...(ca && { ca: pem(ca) }),
    ...(certificate && { cert: pem(certificate) }),
    ...(key && { key: pem(key) }),
    ...(serverName && { servername: serverName }),
  };
}

function pem(value: string | Uint8Array): string | Buffer {
  return typeof value === "string" ? value : Buffer.from(value);
}
