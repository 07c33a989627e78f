/** `connectNode`: a client over gRPC, for Node. */
import { createGrpcTransport, Http2SessionManager } from "@connectrpc/connect-node";
import type { SecureClientSessionOptions } from "node:http2";
import { type ClientOptions, LdaClient } from "./client.js";

const MESSAGE_BYTES_MAX = 20 << 20;
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
  const sessionManager = new Http2SessionManager(baseUrl, KEEPALIVE, options.tls && sessionOptions(options.tls));
  const transport = createGrpcTransport({
    baseUrl,
    sessionManager,
    readMaxBytes: MESSAGE_BYTES_MAX,
    writeMaxBytes: MESSAGE_BYTES_MAX,
  });
  return new LdaClient({ transport, target, close: () => sessionManager.abort() }, options);
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
