/** `connectWeb`: a client over gRPC-Web, for browsers and anything else with `fetch`. */
import { createGrpcWebTransport } from "@connectrpc/connect-web";
import { type ClientOptions, LdaClient } from "./client.js";

export interface WebOptions extends ClientOptions {
  /** What makes the requests; the `fetch` of the page unless given. */
  readonly fetch?: typeof globalThis.fetch | undefined;
}

/**
 * Make a client of the server behind `baseUrl`, such as `http://127.0.0.1:8000`: a proxy that speaks gRPC-Web, which
 * `lda-service gateway` is.
 */
export function connectWeb(baseUrl: string, options: WebOptions = {}): LdaClient {
  const transport = createGrpcWebTransport({ baseUrl, ...(options.fetch && { fetch: options.fetch }) });
  return new LdaClient({ transport, target: baseUrl }, options);
}
