// Continuing from a place in an answer with another token there.
//
// Exact means: the models read the prompt's own token ids, then those of the answer, then the chosen one. The contract
// sends no ids of a prompt, but two calls together give them. `Score` tokenizes a continuation on its own, so the prompt
// as text gives its ids; what a conversation looks like as text, the HTTP API of the earlier server says, for a user
// turn with or without a system turn. Other conversations are continued as text, which may be cut into other tokens.

import { ServerAway, text, tokens } from "@lda/client";
import type { Comparison, Sequence } from "./comparison";
import { wholeText } from "./pieces";
import { isPrefilled, promptOf } from "./requests";
import type { Server } from "./server";
import type { Fork, Settings } from "./settings";

export interface Branch {
  sequence: Sequence;
  /** The tokens before this position are kept. */
  position: number;
  id: number;
  piece: Uint8Array;
}

/** This token cannot be continued from; the message says why. */
export class CannotFork extends Error {}

/** The prompt of a fork. Throws `CannotFork`, or an error of the client. */
export async function forkOf(server: Server, comparison: Comparison, branch: Branch): Promise<Fork> {
  const { sequence, position } = branch;
  const before = comparison.settings.fork?.kept ?? "";
  const pieces = [...sequence.tokens.slice(0, position).map((token) => token.piece), branch.piece];
  const bytes = Uint8Array.from(pieces.flatMap((piece) => [...piece]));
  const kept = before + new TextDecoder("utf-8", { ignoreBOM: true }).decode(bytes);
  const promptIds = await promptIdsOf(server, comparison);
  if (promptIds) return { via: "ids", ids: [...promptIds, ...sequence.ids.slice(0, position), branch.id], kept };
  if (wholeText(bytes) === undefined) {
    throw new CannotFork("This token ends inside a character, and this conversation can only be continued as text.");
  }
  return { via: "text", kept, tokens: (comparison.promptTokenCount ?? 0) + position + 1 };
}

const known = new WeakMap<Comparison, Promise<number[] | undefined>>();

function promptIdsOf(server: Server, comparison: Comparison): Promise<number[] | undefined> {
  const found = known.get(comparison) ?? findPromptIds(server, comparison);
  known.set(comparison, found);
  found.catch(() => known.delete(comparison));
  return found;
}

async function findPromptIds(server: Server, comparison: Comparison): Promise<number[] | undefined> {
  const { settings } = comparison;
  if (settings.fork?.via === "ids") return settings.fork.ids;
  const written = await promptAsText(server, settings);
  if (written === undefined) return undefined;
  // Whatever comes before is not scored; any id of the vocabulary will do.
  const anyId = comparison.rows[0]?.sequences.values().next().value?.ids[0] ?? 0;
  const scored = await server.client.score({ prompt: tokens([anyId]), continuation: text(written) }).gather();
  const ids = scored.tokens.map((token) => token.id);
  // Another number means that the tokenizer puts something before a text.
  return ids.length === comparison.promptTokenCount ? ids : undefined;
}

async function promptAsText(server: Server, settings: Settings): Promise<string | undefined> {
  const { form } = promptOf(settings);
  if (form.case === "text") return form.value;
  const roles = settings.turns.map((turn) => turn.role).join(" ");
  if (settings.fork || isPrefilled(settings) || !["user", "system user"].includes(roles)) return undefined;
  const system = roles === "user" ? {} : { system_prompt: settings.turns[0]!.content };
  const body = { prompt: settings.turns.at(-1)!.content, apply_chat_template: true, max_new_tokens: 1, ...system };
  return await formattedPrompt(server, body);
}

async function formattedPrompt(server: Server, body: object): Promise<string | undefined> {
  const options = { method: "POST", headers: server.headers, body: JSON.stringify(body) };
  const response = await fetch(`${server.origin}/generate_lda`, options).catch(() => {
    throw new ServerAway("The server does not answer.");
  });
  return response.ok ? (await response.json()).formatted_prompt : undefined;
}
