// Everything a person can set on the page. What is undefined is left to the server's default.

export type View = "compare" | "rollouts";
export type PromptForm = "chat" | "text";
export type FilterKind = "text" | "regex";

export interface Turn {
  role: string;
  content: string;
}

/** A prompt that replaces the one in the form: a place in an earlier answer, and another token there. */
export type Fork =
  /** Exactly these tokens. */
  | { via: "ids"; ids: number[]; kept: string }
  /**
   * The prompt in the form with this answer begun: tokenized afresh, so the tokens may differ. They certainly do if
   * their number is another one than `tokens`.
   */
  | { via: "text"; kept: string; tokens: number };

export interface Settings {
  view: View;
  form: PromptForm;
  turns: Turn[];
  text: string;
  /** Whether a last turn of the assistant's is continued instead of answered. */
  prefill: boolean;
  fork: Fork | undefined;
  alpha: number;
  temperature: number | undefined;
  topP: number | undefined;
  topK: number | undefined;
  minP: number | undefined;
  plausibility: number | undefined;
  maxNewTokens: number | undefined;
  stop: string[];
  /** Sequences of the comparison. */
  sequences: number;
  /** Decimal, up to 64 bits. */
  seed: string;
  seedLocked: boolean;
  alphas: number[];
  /** Sequences per alpha. */
  rollouts: number;
  filter: string;
  filterKind: FilterKind;
  matchCase: boolean;
}

export const DEFAULTS: Readonly<Settings> = Object.freeze({
  view: "compare",
  form: "chat",
  turns: [{ role: "user", content: "Good morning!" }],
  text: "",
  prefill: false,
  fork: undefined,
  alpha: 1,
  temperature: 1,
  topP: 1,
  topK: undefined,
  minP: undefined,
  plausibility: undefined,
  maxNewTokens: 200,
  stop: [],
  sequences: 1,
  seed: "1",
  seedLocked: false,
  alphas: [-1, 0, 0.25, 0.5, 0.75, 1],
  rollouts: 64,
  filter: "",
  filterKind: "text",
  matchCase: false,
});

/** What a number may be, in the contract. */
export const RANGES = {
  alpha: { min: -100, max: 100, whole: false },
  temperature: { min: 0, max: 10, whole: false },
  topP: { min: 0.001, max: 1, whole: false },
  topK: { min: 0, max: 2 ** 32 - 1, whole: true },
  minP: { min: 0, max: 1, whole: false },
  plausibility: { min: 0, max: 1, whole: false },
  maxNewTokens: { min: 1, max: 131072, whole: true },
  sequences: { min: 1, max: 1024, whole: true },
  rollouts: { min: 1, max: 1024, whole: true },
} as const;

export type NumberKey = keyof typeof RANGES;

export const MAX_STOP_STRINGS = 16;
export const MAX_ALPHAS = 32;

/** A copy that shares nothing with its original. */
export function freshDefaults(): Settings {
  return structuredClone(DEFAULTS) as Settings;
}

/** A number that a person wrote, if it is one that the contract takes. */
export function parseNumber(key: NumberKey, written: string): number | undefined {
  const { min, max, whole } = RANGES[key];
  const value = Number(written.trim().replace("−", "-"));
  if (written.trim() === "" || !Number.isFinite(value) || value < min || value > max) return undefined;
  return whole && !Number.isInteger(value) ? undefined : value;
}

/** Alphas from a list like "-1, 0, 0.5": distinct, ascending; undefined if any is no alpha. */
export function parseAlphas(written: string): number[] | undefined {
  const parts = written.split(/[\s,;]+/).filter((part) => part !== "");
  const alphas = parts.map((part) => parseNumber("alpha", part));
  if (alphas.length === 0 || alphas.length > MAX_ALPHAS || alphas.includes(undefined)) return undefined;
  return [...new Set(alphas as number[])].sort((a, b) => a - b);
}

/** A seed that a person wrote: a whole number of up to 64 bits. */
export function parseSeed(written: string): string | undefined {
  if (!/^\d{1,20}$/.test(written.trim())) return undefined;
  const seed = BigInt(written.trim());
  return seed < 2n ** 64n ? seed.toString() : undefined;
}

/** A seed that is short enough to read out. */
export function randomSeed(): string {
  return String(crypto.getRandomValues(new Uint32Array(1))[0]! % 1_000_000);
}
