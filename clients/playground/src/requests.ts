// Settings to the request messages of the contract.

import { create, type MessageInitShape } from "@bufbuild/protobuf";
import {
  GenerateBothRequestSchema,
  GenerateLDARequestSchema,
  PromptSchema,
  type GenerateBothRequest,
  type GenerateLDARequest,
  type Prompt,
} from "@lda/client";
import type { Settings } from "./settings";

export const CANDIDATES = 10;
const FOLLOWED_MAX = 4;
const MANY_EVENT_TOKENS = 8;
const MANY_EVENT_DELAY_MS = 100;
const ROLLOUT_EVENT_TOKENS = 32;
const ROLLOUT_EVENT_DELAY_MS = 200;

/** What the models are to continue. */
export function promptOf(settings: Settings): Prompt {
  return create(PromptSchema, { form: promptForm(settings) });
}

function promptForm(settings: Settings): MessageInitShape<typeof PromptSchema>["form"] {
  const { fork } = settings;
  if (fork?.via === "ids") return { case: "tokens", value: { ids: fork.ids } };
  if (settings.form === "text") return { case: "text", value: settings.text + (fork?.kept ?? "") };
  const messages = fork ? turnsWithAnswer(settings, fork.kept) : settings.turns;
  return { case: "chat", value: { messages, continueFinalMessage: fork !== undefined || isPrefilled(settings) } };
}

function turnsWithAnswer(settings: Settings, kept: string) {
  if (!isPrefilled(settings)) return [...settings.turns, { role: "assistant", content: kept }];
  const last = settings.turns.at(-1)!;
  return [...settings.turns.slice(0, -1), { ...last, content: last.content + kept }];
}

/** Whether the last turn is an answer that the models go on with. */
export function isPrefilled(settings: Settings): boolean {
  return settings.prefill && settings.turns.at(-1)?.role === "assistant";
}

/** The same for both calls of a comparison. */
function shared(settings: Settings, numSequences: number) {
  const { temperature, topP, topK, minP, plausibility, maxNewTokens, stop } = settings;
  return {
    prompt: promptOf(settings),
    // The contract draws greedily one sequence only.
    numSequences: temperature === 0 ? 1 : numSequences,
    sampling: { temperature, topP, topK, minP, plausibility, seed: BigInt(settings.seed) },
    stopping: { maxNewTokens, stopStrings: stop },
  };
}

/** A token a message as long as there are few answers to follow. */
function comparisonOutput({ sequences }: Settings) {
  const evidence = { diagnostics: true, topCandidates: CANDIDATES };
  return sequences <= FOLLOWED_MAX ? evidence : { ...evidence, ...grouped(MANY_EVENT_TOKENS, MANY_EVENT_DELAY_MS) };
}

function grouped(maxTokensPerEvent: number, delayMs: number) {
  return { maxTokensPerEvent, maxEventDelay: { seconds: 0n, nanos: delayMs * 1e6 } };
}

/** The amplified column. */
export function amplifiedRequest(settings: Settings): GenerateLDARequest {
  const { alpha, sequences } = settings;
  return create(GenerateLDARequestSchema, {
    ...shared(settings, sequences),
    alpha,
    output: comparisonOutput(settings),
  });
}

/** The columns of the two models, on the noise of the amplified one. */
export function bothRequest(settings: Settings): GenerateBothRequest {
  return create(GenerateBothRequestSchema, {
    ...shared(settings, settings.sequences),
    output: comparisonOutput(settings),
  });
}

/** Rollouts at one alpha: text only, a few messages per sequence. */
export function rolloutsRequest(settings: Settings, alpha: number): GenerateLDARequest {
  return create(GenerateLDARequestSchema, {
    ...shared(settings, settings.rollouts),
    alpha,
    output: grouped(ROLLOUT_EVENT_TOKENS, ROLLOUT_EVENT_DELAY_MS),
  });
}
