// Settings to the fragment of a link and back. The fragment stays in the browser: no server sees the prompt in it.
//
// A link holds what differs from the defaults. One of another version, or a hand-edited one, gives what can be read of
// it: each field is taken or left on its own.

import {
  DEFAULTS,
  freshDefaults,
  MAX_STOP_STRINGS,
  parseAlphas,
  parseNumber,
  parseSeed,
  type Fork,
  type NumberKey,
  type Settings,
  type Turn,
} from "./settings";

export const LINK_VERSION = "1";

interface Field<K extends keyof Settings> {
  write(value: Settings[K]): string;
  /** Undefined if the text holds no such value. */
  read(text: string): Settings[K] | undefined;
}

const FIELDS: { [K in keyof Settings]: Field<K> } = {
  view: oneOf("compare", "rollouts"),
  form: oneOf("chat", "text"),
  turns: { write: writeTurns, read: readTurns },
  text: anyText(),
  prefill: yesOrNo(),
  fork: { write: (fork) => JSON.stringify(fork), read: readFork },
  alpha: number("alpha") as Field<"alpha">,
  temperature: number("temperature"),
  topP: number("topP"),
  topK: number("topK"),
  minP: number("minP"),
  plausibility: number("plausibility"),
  maxNewTokens: number("maxNewTokens"),
  stop: { write: (stop) => JSON.stringify(stop), read: readStop },
  sequences: number("sequences") as Field<"sequences">,
  seed: { write: (seed) => seed, read: parseSeed },
  seedLocked: yesOrNo(),
  alphas: { write: (alphas) => alphas.join(","), read: parseAlphas },
  rollouts: number("rollouts") as Field<"rollouts">,
  filter: anyText(),
  filterKind: oneOf("text", "regex"),
  matchCase: yesOrNo(),
};

const KEYS = Object.keys(FIELDS) as (keyof Settings)[];

/** The fragment, without `#`. */
export function toFragment(settings: Settings): string {
  const parameters = new URLSearchParams({ v: LINK_VERSION });
  for (const key of KEYS) {
    const written = write(key, settings);
    if (written !== write(key, DEFAULTS as Settings)) parameters.set(key, written);
  }
  return parameters.toString();
}

export interface Reading {
  settings: Settings;
  /** Names of what was there and could not be read. */
  ignored: string[];
  /** Whether the link was made by a later page. */
  newer: boolean;
}

/** Settings from a fragment, with or without `#`. Never throws. */
export function fromFragment(fragment: string): Reading {
  const parameters = new URLSearchParams(fragment.replace(/^#/, ""));
  const reading: Reading = { settings: freshDefaults(), ignored: [], newer: isNewer(parameters.get("v")) };
  for (const [name, text] of parameters) {
    if (name !== "v" && !take(reading.settings, name, text)) reading.ignored.push(name);
  }
  return reading;
}

function isNewer(version: string | null): boolean {
  return version !== null && Number(version) > Number(LINK_VERSION);
}

function write<K extends keyof Settings>(key: K, settings: Settings): string {
  return settings[key] === undefined ? "" : FIELDS[key].write(settings[key]);
}

function take(settings: Settings, name: string, text: string): boolean {
  if (!Object.hasOwn(FIELDS, name)) return false;
  const key = name as keyof Settings;
  const value = text === "" && isOptional(key) ? undefined : FIELDS[key].read(text);
  if (value === undefined && text !== "") return false;
  if (value !== undefined || isOptional(key)) Object.assign(settings, { [key]: value });
  return true;
}

/** An empty value of these is the server's default. */
function isOptional(key: keyof Settings): boolean {
  return ["temperature", "topP", "topK", "minP", "plausibility", "maxNewTokens"].includes(key);
}

function oneOf<T extends string>(...values: T[]) {
  return { write: (value: T) => value, read: (text: string) => values.find((value) => value === text) };
}

function anyText() {
  return { write: (value: string) => value, read: (text: string) => text };
}

function yesOrNo() {
  return {
    write: (value: boolean) => (value ? "1" : "0"),
    read: (text: string) => ({ "1": true, "0": false })[text],
  };
}

function number(key: NumberKey) {
  return { write: (value: number | undefined) => String(value), read: (text: string) => parseNumber(key, text) };
}

function writeTurns(turns: Turn[]): string {
  return JSON.stringify(turns.map(({ role, content }) => [role, content]));
}

function readTurns(text: string): Turn[] | undefined {
  const turns = parsed(text);
  if (!Array.isArray(turns) || turns.length === 0 || turns.length > 256) return undefined;
  const isTurn = (turn: unknown) => isTexts(turn) && turn.length === 2 && turn[0] !== "";
  return turns.every(isTurn) ? turns.map(([role, content]) => ({ role, content })) : undefined;
}

function readStop(text: string): string[] | undefined {
  const stop = parsed(text);
  return isTexts(stop) && stop.length <= MAX_STOP_STRINGS && !stop.includes("") ? [...new Set(stop)] : undefined;
}

function readFork(text: string): Fork | undefined {
  const fork = parsed(text) as Record<string, unknown> | undefined;
  if (typeof fork !== "object" || fork === null || typeof fork.kept !== "string") return undefined;
  const { via, kept, ids, tokens } = fork;
  if (via === "text") return isCount(tokens) ? { via, kept, tokens } : undefined;
  if (via !== "ids" || !Array.isArray(ids) || ids.length === 0 || !ids.every(isCount)) return undefined;
  return { via, ids, kept };
}

function isCount(value: unknown): value is number {
  return Number.isInteger(value) && (value as number) >= 0 && (value as number) < 2 ** 32;
}

function isTexts(value: unknown): value is string[] {
  return Array.isArray(value) && value.every((each) => typeof each === "string");
}

function parsed(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}
