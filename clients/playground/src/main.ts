// The page: puts the parts together, and runs what they ask for.

import { Comparison, type Outcome, type Sequence } from "./comparison";
import { CompareView, type Place } from "./compare_view";
import { alphaText, byId, copy, make } from "./dom";
import { CannotFork, forkOf } from "./forks";
import { Inspector } from "./inspector";
import { fromFragment, toFragment } from "./link";
import { problemOf, type Problem } from "./problems";
import { RolloutsRun } from "./rollouts";
import { RolloutsView } from "./rollouts_view";
import { Server } from "./server";
import { randomSeed, type Settings, type View } from "./settings";
import { SettingsForm } from "./settings_form";
import { snippet, type Language } from "./snippets";
import { Store } from "./store";
import { showHealth } from "./health_view";
import { bindTheme } from "./theme";

const PAST_MAX = 20;
const VIEWS: readonly View[] = ["compare", "rollouts"];

const reading = fromFragment(location.hash);
if (!location.hash) reading.settings.seed = randomSeed();
const store = new Store(reading.settings);
const server = new Server(location.origin);
const form = new SettingsForm(store);
const rolloutsView = new RolloutsView(store.settings.alphas);
const inspector = new Inspector(server, { onFork: fork, onClose: () => compareView.release() });
const compareView = new CompareView(
  {
    onLook: (place) => shown && inspector.look(shown, place),
    onChoose: (place) => shown && void inspector.pin(shown, place),
  },
  (id) => server.endIds.has(id),
);

let running: Comparison | RolloutsRun | undefined;
let shown: Comparison | undefined;
const past: Comparison[] = [];
let usedSeed: string | undefined;

// Running

function run(): void {
  const { mistake } = form;
  if (mistake) {
    mistake.focus();
    say(`${mistake.title} Mend the marked field first.`);
    return;
  }
  running?.cancel();
  freshSeed();
  showProblem(undefined);
  if (store.settings.view === "compare") compare();
  else rollOut();
  showRunning();
  revealResults();
}

/** Where there is room for one column only, the results are far below the button. */
function revealResults(): void {
  const results = byId("results");
  if (results.getBoundingClientRect().top > innerHeight / 2) results.scrollIntoView();
}

/** Unless it is kept, a seed is used once. A fork goes on with the noise of its run. */
function freshSeed(): void {
  const { seed, seedLocked, fork } = store.settings;
  if (!seedLocked && !fork && seed === usedSeed) store.change({ seed: randomSeed() });
  usedSeed = store.settings.seed;
}

function compare(): void {
  const comparison: Comparison = new Comparison(server, structuredClone(store.settings) as Settings, {
    onRows: (rows) => comparison === shown && compareView.add(rows),
    onSequence: (sequence) => grew(comparison, sequence),
    onOutcome: () => ended(comparison),
  });
  past.push(comparison);
  if (past.length > PAST_MAX) past.shift();
  running = comparison;
  showPast(comparison);
  say("Waiting for the first token …");
  void comparison.run();
}

function grew(comparison: Comparison, sequence: Sequence): void {
  if (comparison === shown) compareView.update(sequence);
  if (comparison === running && comparison.isRunning) sayCounted(comparison);
}

function sayCounted(comparison: Comparison): void {
  // Announced once: a screen reader has no use for a counter.
  if (byId("status").dataset.run === String(past.indexOf(comparison))) return;
  byId("status").dataset.run = String(past.indexOf(comparison));
  say("Streaming …");
}

function rollOut(): void {
  const rollouts: RolloutsRun = new RolloutsRun(server, structuredClone(store.settings) as Settings, {
    onText: (rollout, text) => rolloutsView.grow(rollout, text),
    onFinished: (rollout) => rolloutsView.finish(rollout),
    onBatch: () => rolloutsView.update(),
    onOutcome: () => ended(rollouts),
  });
  running = rollouts;
  rolloutsView.show(rollouts);
  say(`Drawing ${rollouts.settings.rollouts} completions at each of ${rollouts.batches.length} alphas …`);
  void rollouts.run();
}

function ended(run: Comparison | RolloutsRun): void {
  if (run === shown) compareView.settle();
  if (run !== running) return;
  running = undefined;
  delete byId("status").dataset.run;
  say(outcomeWords(run.outcome, run));
  if (run.outcome.kind === "failed") showProblem(problemOf(run.outcome.error));
  showRunning();
  rolloutsView.update();
  server.look();
}

function outcomeWords(outcome: Outcome, run: Comparison | RolloutsRun): string {
  const { seed } = run.settings;
  if (outcome.kind === "cancelled") return "Cancelled.";
  if (outcome.kind !== "done") return "";
  if (run instanceof RolloutsRun) {
    const count = run.batches.reduce((sum, batch) => sum + batch.finishedCount, 0);
    return `Done: ${count} completions, seed ${seed}.`;
  }
  return `Done: prompt of ${run.promptTokenCount} tokens, seed ${seed}. ${forkWords(run)}`;
}

/** A fork through text may have been cut into other tokens; a wrong count proves it. */
function forkWords({ settings: { fork }, promptTokenCount }: Comparison): string {
  if (fork?.via !== "text") return "";
  if (fork.tokens === promptTokenCount) return "Forked through text, into as many tokens as expected.";
  return `Forked through text, which was cut into other tokens than before (${fork.tokens} expected).`;
}

function cancel(): void {
  running?.cancel();
}

function showRunning(): void {
  byId<HTMLButtonElement>("cancel").disabled = running === undefined;
  document.body.classList.toggle("running", running !== undefined);
  showHealth(server, running !== undefined);
}

// Forks and earlier runs

async function fork(place: Place, candidate: { id: number; piece: Uint8Array }): Promise<void> {
  const from = shown!;
  try {
    const made = await forkOf(server, from, { ...place, ...candidate });
    inspector.close();
    store.replace({ ...store.settings, ...promptSettings(from), fork: made, sequences: 1 });
    run();
    byId("results").focus();
  } catch (error) {
    if (error instanceof CannotFork) say(error.message);
    else showProblem(problemOf(error));
  }
}

/** What must be as it was in the run that is forked, for the noise to be the same. */
function promptSettings({ settings }: Comparison): Partial<Settings> {
  const { form, turns, text, prefill, seed, alpha } = settings;
  return { view: "compare", form, turns, text, prefill, seed, alpha };
}

function showPast(comparison: Comparison): void {
  shown = comparison;
  inspector.close();
  compareView.show(comparison);
  const index = past.indexOf(comparison);
  byId("past").hidden = past.length < 2;
  byId("past-where").textContent = `run ${index + 1} of ${past.length}, α = ${alphaText(comparison.settings.alpha)}`;
  byId<HTMLButtonElement>("earlier").disabled = index === 0;
  byId<HTMLButtonElement>("later").disabled = index === past.length - 1;
}

function step(by: number): void {
  const comparison = past[past.indexOf(shown!) + by];
  if (!comparison) return;
  store.replace({ ...(structuredClone(comparison.settings) as Settings), view: "compare" });
  showPast(comparison);
}

// What is said

function say(words: string): void {
  byId("status").textContent = words;
}

let countdown: ReturnType<typeof setInterval> | undefined;

function showProblem(problem: Problem | undefined): void {
  clearInterval(countdown);
  const place = byId("problem");
  place.hidden = problem === undefined;
  place.dataset.passes = String(problem?.passes ?? false);
  if (!problem) return;
  const again = make("button", { type: "button", id: "again", text: "Run again", on: { click: run } });
  place.replaceChildren(make("strong", { text: problem.title }), make("p", { text: problem.text }), again);
  if (problem.needsAccess) byId<HTMLDetailsElement>("access").open = true;
  if (problem.retryAfterS) holdBack(again, problem.retryAfterS);
}

/** The server asked for a pause: the button counts it down. */
function holdBack(button: HTMLButtonElement, seconds: number): void {
  let left = Math.ceil(seconds);
  const tick = () => {
    button.textContent = left > 0 ? `Run again in ${left} s` : "Run again";
    button.disabled = left > 0;
    if (left-- <= 0) clearInterval(countdown);
  };
  tick();
  countdown = setInterval(tick, 1000);
}

function showServer(): void {
  showHealth(server, running !== undefined);
  const isBack = server.health.kind === "ready" || server.health.kind === "busy";
  if (server.pair) form.know(server.pair);
  if (!isBack || byId("problem").hidden || byId("problem").dataset.passes !== "true") return;
  showProblem(undefined);
  say("The server is back: run again when you like.");
}

// Settings, links and code

function showView({ view }: Readonly<Settings>): void {
  for (const each of VIEWS) {
    byId(each).hidden = each !== view;
    const tab = byId(`tab-${each}`);
    tab.setAttribute("aria-selected", String(each === view));
    tab.tabIndex = each === view ? 0 : -1;
  }
}

let filtered = "";

function showFilter({ filter, filterKind, matchCase }: Readonly<Settings>): void {
  const field = byId<HTMLInputElement>("filter");
  if (field.value !== filter) field.value = filter;
  byId<HTMLInputElement>("filter-regex").checked = filterKind === "regex";
  byId<HTMLInputElement>("filter-case").checked = matchCase;
  const key = JSON.stringify([filter, filterKind, matchCase]);
  if (key === filtered) return;
  filtered = key;
  rolloutsView.look({ pattern: filter, kind: filterKind, matchCase });
}

let linkTimer: ReturnType<typeof setTimeout> | undefined;

/** Browsers refuse a page that rewrites its address at every key. */
function keepLink(settings: Readonly<Settings>): void {
  clearTimeout(linkTimer);
  linkTimer = setTimeout(() => history.replaceState(null, "", `#${toFragment(settings)}`), 300);
}

function link(): string {
  return `${location.origin}${location.pathname}#${toFragment(store.settings)}`;
}

async function copied(button: HTMLElement, text: string): Promise<void> {
  const words = button.textContent;
  button.textContent = (await copy(text)) ? "Copied" : "Copying failed";
  setTimeout(() => (button.textContent = words), 1500);
}

function showCode(): void {
  const language = document.querySelector<HTMLInputElement>("input[name=language]:checked")!.value as Language;
  byId("code-text").textContent = snippet(language, store.settings, location.origin);
}

function openDialog(id: string): void {
  byId<HTMLDialogElement>(id).showModal();
}

// Keyboard

function onKey(event: KeyboardEvent): void {
  if (document.querySelector("dialog[open]")) return;
  const isWriting = event.target instanceof Element && event.target.matches("input, textarea, select");
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) run();
  else if (event.key === "Escape") escape();
  else if (event.altKey && ["1", "2"].includes(event.key)) store.change({ view: VIEWS[Number(event.key) - 1]! });
  else if (isWriting || event.ctrlKey || event.metaKey || event.altKey) return;
  else if (event.key === "?") openDialog("help");
  else if (event.key === "/") focusFilter();
  else return;
  event.preventDefault();
}

function escape(): void {
  if (running) cancel();
  else inspector.close();
}

function focusFilter(): void {
  store.change({ view: "rollouts" });
  byId<HTMLInputElement>("filter").select();
}

function onTabKey(event: KeyboardEvent): void {
  if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
  const view = VIEWS.find((each) => each !== store.settings.view)!;
  store.change({ view });
  byId(`tab-${view}`).focus();
}

function bind(): void {
  byId("settings").addEventListener("submit", (event) => {
    event.preventDefault();
    run();
  });
  byId("cancel").addEventListener("click", cancel);
  for (const view of VIEWS) {
    byId(`tab-${view}`).addEventListener("click", () => store.change({ view }));
    byId(`tab-${view}`).addEventListener("keydown", onTabKey);
  }
  byId("earlier").addEventListener("click", () => step(-1));
  byId("later").addEventListener("click", () => step(1));
  bindFilter();
  bindDialogs();
  const token = byId<HTMLInputElement>("token");
  token.addEventListener("change", () => server.identify(token.value.trim()));
  document.addEventListener("keydown", onKey);
  // A page that goes must not leave its calls to the browser's discretion.
  addEventListener("pagehide", cancel);
  addEventListener("hashchange", () => openLink(location.hash));
}

function bindFilter(): void {
  const filter = byId<HTMLInputElement>("filter");
  filter.addEventListener("input", () => store.change({ filter: filter.value }));
  const regex = byId<HTMLInputElement>("filter-regex");
  regex.addEventListener("change", () => store.change({ filterKind: regex.checked ? "regex" : "text" }));
  const matchCase = byId<HTMLInputElement>("filter-case");
  matchCase.addEventListener("change", () => store.change({ matchCase: matchCase.checked }));
}

function bindDialogs(): void {
  byId("open-help").addEventListener("click", () => openDialog("help"));
  byId("open-code").addEventListener("click", () => {
    showCode();
    openDialog("code");
  });
  byId("code").addEventListener("change", showCode);
  byId("copy-code").addEventListener("click", () => copied(byId("copy-code"), byId("code-text").textContent ?? ""));
  byId("copy-link").addEventListener("click", () => copied(byId("copy-link"), link()));
  for (const button of document.querySelectorAll<HTMLButtonElement>("dialog .close")) {
    button.addEventListener("click", () => button.closest("dialog")!.close());
  }
}

function openLink(fragment: string): void {
  const { settings, ignored, newer } = fromFragment(fragment);
  store.replace(settings);
  sayReading(ignored, newer);
}

function sayReading(ignored: readonly string[], newer: boolean): void {
  if (newer) say("This link was made by a later version of this page: what this one knows of it is set.");
  else if (ignored.length > 0) say(`Not understood in the link, and left at the default: ${ignored.join(", ")}.`);
}

bind();
bindTheme();
store.onChange(showView);
store.onChange(showFilter);
store.onChange(keepLink);
store.onChange(({ alphas }) => rolloutsView.expect(alphas));
showView(store.settings);
showFilter(store.settings);
sayReading(reading.ignored, reading.newer);
server.onChange(showServer);
server.look();
