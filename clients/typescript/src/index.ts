/**
 * Typed client for the LDA service: logit diff amplification.
 *
 *     import { text } from "@lda/client";
 *     import { connectNode } from "@lda/client/node"; // in a browser: connectWeb from "@lda/client/web"
 *
 *     const client = connectNode("127.0.0.1:50051");
 *     for await (const piece of client.generate({ prompt: text("Good morning"), alpha: 1 }).text()) {
 *       process.stdout.write(piece.text);
 *     }
 */
export type { CallOptions } from "./call.js";
export {
  type ClientOptions,
  type Connection,
  type GenerateBothInit,
  type GenerateInit,
  LdaClient,
  type ScoreInit,
} from "./client.js";
export * from "./errors.js";
export type { Completion, GenerateEvent, ScoredText } from "./gather.js";
export * from "./gen/lda/v1/lda_service_pb.js";
export * from "./prompts.js";
export { EventStream, GenerateStream, ScoreStream, type TextPiece } from "./stream.js";
