/** What to continue, in its three forms. */
import { create } from "@bufbuild/protobuf";
import { type Prompt, PromptSchema } from "./gen/lda/v1/lda_service_pb.js";

/** One turn of a conversation. */
export interface Turn {
  /** Who speaks, as the chat template names it: `user`, `assistant`, `system`. */
  readonly role: string;
  readonly content: string;
}

/** Plain text, without the chat template. */
export function text(value: string): Prompt {
  return create(PromptSchema, { form: { case: "text", value: whole(value) } });
}

/**
 * A conversation, rendered by the chat template of the pair. A plain string is one turn of the user.
 *
 * @param options.continueFinalMessage continue the last turn instead of opening a new one: a prefilled answer.
 */
export function chat(turns: string | readonly Turn[], options: { continueFinalMessage?: boolean } = {}): Prompt {
  const given = typeof turns === "string" ? [{ role: "user", content: turns }] : turns;
  const messages = given.map(({ role, content }) => ({ role, content: whole(content) }));
  return create(PromptSchema, { form: { case: "chat", value: { messages, ...options } } });
}

/** Token ids, used as they are. */
export function tokens(ids: Iterable<number>): Prompt {
  return create(PromptSchema, { form: { case: "tokens", value: { ids: [...ids] } } });
}

/** Half a character, as cutting a string can leave, would silently become another one on the way. */
function whole(value: string): string {
  const half = /[\uD800-\uDBFF](?![\uDC00-\uDFFF])|(?<![\uD800-\uDBFF])[\uDC00-\uDFFF]/.exec(value);
  if (half) {
    throw new TypeError(`The prompt holds half of a character at index ${half.index}; cut strings between characters.`);
  }
  return value;
}
