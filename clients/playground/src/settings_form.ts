// The form on the left: what is written in it becomes settings, and settings from elsewhere are written into it.

import type { GetModelPairResponse } from "@lda/client";
import { alphaAt, LAST_STOP, MARKS, stopOf } from "./alpha_scale";
import { alphaText, byId, make } from "./dom";
import {
  MAX_ALPHAS,
  MAX_STOP_STRINGS,
  parseAlphas,
  parseNumber,
  parseSeed,
  randomSeed,
  RANGES,
  type NumberKey,
  type PromptForm,
  type Settings,
} from "./settings";
import type { Store } from "./store";
import { TurnsEditor } from "./turns_editor";

/** A change of any of these gives up a fork, which has a prompt of its own. */
const PROMPT_KEYS = ["form", "turns", "text", "prefill"] as const;

const OPTIONAL: readonly NumberKey[] = ["temperature", "topP", "topK", "minP", "plausibility", "maxNewTokens"];

export class SettingsForm {
  private readonly numbers = [...document.querySelectorAll<HTMLInputElement>("[data-number]")];
  private readonly slider = byId<HTMLInputElement>("alpha-slider");
  private readonly turns: TurnsEditor;

  constructor(private readonly store: Store) {
    this.turns = new TurnsEditor((turns) => this.changePrompt({ turns }));
    this.bindPrompt();
    this.bindAlpha();
    this.bindNumbers();
    this.bindSeed();
    this.bindStop();
    store.onChange((settings) => this.show(settings));
    this.show(store.settings);
  }

  /** Show what the server does where nothing is set, and what its pair cannot do. */
  know(pair: GetModelPairResponse): void {
    const { sampling, stopping } = pair.defaults ?? {};
    const defaults = { ...sampling, maxNewTokens: stopping?.maxNewTokens } as Partial<Record<string, unknown>>;
    for (const field of this.numbers) {
      const value = defaults[field.dataset.number!];
      if (typeof value === "number") field.placeholder = String(Number(value.toPrecision(6)));
    }
    byId("no-template").hidden = pair.hasChatTemplate;
    if (!pair.hasChatTemplate && this.store.settings.form === "chat") {
      this.store.change({ form: "text", text: this.store.settings.turns.at(-1)?.content ?? "" });
    }
  }

  /** The first field that holds what cannot be sent; undefined if all is well. */
  get mistake(): HTMLInputElement | undefined {
    const fields = document.querySelectorAll<HTMLInputElement>("#settings [aria-invalid='true']");
    return [...fields].find((field) => field.offsetParent !== null);
  }

  private changePrompt(patch: Partial<Pick<Settings, (typeof PROMPT_KEYS)[number]>>): void {
    this.store.change({ ...patch, fork: undefined });
  }

  private bindPrompt(): void {
    for (const radio of radios("form")) {
      radio.addEventListener("change", () => this.changePrompt({ form: radio.value as PromptForm }));
    }
    const text = byId<HTMLTextAreaElement>("text");
    text.addEventListener("input", () => this.changePrompt({ text: text.value }));
    const prefill = byId<HTMLInputElement>("prefill");
    prefill.addEventListener("change", () => this.changePrompt({ prefill: prefill.checked }));
    byId("drop-fork").addEventListener("click", () => this.store.change({ fork: undefined }));
  }

  private bindAlpha(): void {
    this.slider.max = String(LAST_STOP);
    this.slider.addEventListener("input", () => this.store.change({ alpha: alphaAt(this.slider.valueAsNumber) }));
    for (const mark of MARKS) {
      const label = make("span", { text: alphaText(mark) });
      label.style.setProperty("--at", String(stopOf(mark) / LAST_STOP));
      byId("alpha-marks").append(label);
    }
    const alphas = byId<HTMLInputElement>("alphas");
    alphas.addEventListener("input", () => {
      const value = parseAlphas(alphas.value);
      judge(alphas, value !== undefined, `Up to ${MAX_ALPHAS} alphas, such as -1, 0, 0.5.`);
      if (value) this.store.change({ alphas: value });
    });
  }

  private bindNumbers(): void {
    for (const field of this.numbers) {
      const key = field.dataset.number as NumberKey;
      field.addEventListener("input", () => {
        const isLeft = field.value.trim() === "" && OPTIONAL.includes(key);
        const value = parseNumber(key, field.value);
        judge(field, isLeft || value !== undefined, rangeWords(key));
        if (isLeft || value !== undefined) this.store.change({ [key]: value });
      });
    }
  }

  private bindSeed(): void {
    const seed = byId<HTMLInputElement>("seed");
    seed.addEventListener("input", () => {
      const value = parseSeed(seed.value);
      judge(seed, value !== undefined, "A whole number of up to 64 bits.");
      // A seed that somebody wrote is one that they mean to keep.
      if (value !== undefined) this.store.change({ seed: value, seedLocked: true });
    });
    const locked = byId<HTMLInputElement>("seed-locked");
    locked.addEventListener("change", () => this.store.change({ seedLocked: locked.checked }));
    byId("reroll").addEventListener("click", () => this.store.change({ seed: randomSeed() }));
  }

  private bindStop(): void {
    const stop = byId<HTMLTextAreaElement>("stop");
    stop.addEventListener("input", () => {
      const strings = [...new Set(stop.value.split("\n").filter(Boolean).map(unescaped))];
      judge(stop, strings.length <= MAX_STOP_STRINGS, `Up to ${MAX_STOP_STRINGS} strings.`);
      if (strings.length <= MAX_STOP_STRINGS) this.store.change({ stop: strings });
    });
  }

  private show(settings: Readonly<Settings>): void {
    this.showPrompt(settings);
    this.showAlpha(settings);
    for (const field of this.numbers) write(field, settings[field.dataset.number as NumberKey]);
    write(byId<HTMLInputElement>("alphas"), settings.alphas.join(", "));
    write(byId<HTMLInputElement>("seed"), settings.seed);
    write(byId<HTMLTextAreaElement>("stop"), settings.stop.map(escaped).join("\n"));
    byId<HTMLInputElement>("seed-locked").checked = settings.seedLocked;
    const isComparing = settings.view === "compare";
    for (const id of ["alpha-row", "sequences-row"]) byId(id).hidden = !isComparing;
    for (const id of ["alphas-row", "rollouts-row"]) byId(id).hidden = isComparing;
  }

  private showPrompt(settings: Readonly<Settings>): void {
    for (const radio of radios("form")) radio.checked = radio.value === settings.form;
    byId("chat-form").hidden = settings.form !== "chat";
    byId("text-form").hidden = settings.form !== "text";
    this.turns.show(settings.turns);
    write(byId<HTMLTextAreaElement>("text"), settings.text);
    byId("prefill-row").hidden = settings.turns.at(-1)?.role !== "assistant";
    byId<HTMLInputElement>("prefill").checked = settings.prefill;
    this.showFork(settings);
  }

  private showFork({ fork }: Readonly<Settings>): void {
    byId("fork").hidden = fork === undefined;
    if (!fork) return;
    byId("fork-how").textContent =
      fork.via === "ids"
        ? `Both models read exactly these ${fork.ids.length} tokens and go on after:`
        : "The answer is sent as text and may be cut into other tokens. Both models go on after:";
    byId("fork-kept").textContent = fork.kept;
  }

  private showAlpha({ alpha }: Readonly<Settings>): void {
    this.slider.value = String(stopOf(alpha));
    this.slider.setAttribute("aria-valuetext", alphaText(alpha));
    byId("alpha-words").textContent = alphaWords(alpha);
  }
}

/** What an alpha means. */
export function alphaWords(alpha: number): string {
  if (alpha < -1) return "Beyond before: away from what training added.";
  if (alpha === -1) return "The before model.";
  if (alpha < 0) return "On the way from before to after.";
  if (alpha === 0) return "The after model, nothing amplified.";
  if (alpha <= 2) return "What training changed, amplified.";
  return "High: for pairs that barely differ; others fall apart here.";
}

function radios(name: string): HTMLInputElement[] {
  return [...document.querySelectorAll<HTMLInputElement>(`input[name="${name}"]`)];
}

/** Leave alone what is being written: a person may be half way to another number. */
function write(field: HTMLInputElement | HTMLTextAreaElement, value: string | number | undefined): void {
  const written = value === undefined ? "" : String(value);
  if (document.activeElement === field || field.value === written) return;
  field.value = written;
  judge(field, true, "");
}

function judge(field: HTMLInputElement | HTMLTextAreaElement, isGood: boolean, rule: string): void {
  field.setAttribute("aria-invalid", String(!isGood));
  field.title = isGood ? "" : rule;
}

function rangeWords(key: NumberKey): string {
  const { min, max, whole } = RANGES[key];
  return `A ${whole ? "whole " : ""}number from ${min} to ${max}.`;
}

const ESCAPES: Record<string, string> = { "\\n": "\n", "\\t": "\t", "\\\\": "\\" };

function unescaped(text: string): string {
  return text.replace(/\\[nt\\]/g, (escape) => ESCAPES[escape]!);
}

function escaped(text: string): string {
  return text.replaceAll("\\", "\\\\").replaceAll("\n", "\\n").replaceAll("\t", "\\t");
}
