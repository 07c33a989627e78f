// The filter over all completions, in a worker, within a time that a person is willing to wait.

import type { Filter, Span } from "./matching";
import type { Answer, Question } from "./matching_worker";

const TIME_MAX_MS = 1000;

export interface Matches {
  /** Of each text that matches, by its id. */
  found: Map<number, Span[]>;
  /** What is wrong with the filter. */
  complaint: string | undefined;
}

const NOTHING: Matches = { found: new Map(), complaint: undefined };

/** Keeps the texts, and answers with what the filter finds in them whenever either changes. */
export class Matcher {
  private worker: Worker | undefined;
  private timer: ReturnType<typeof setTimeout> | undefined;
  private texts: [number, string][] = [];
  private sent = 0;
  private ask = 0;
  private isStale = false;
  private filter: Filter | undefined;

  constructor(private readonly onMatches: (matches: Matches) => void) {}

  /** Look through this text too. */
  add(id: number, text: string): void {
    this.texts.push([id, text]);
    this.refresh();
  }

  /** Drop all texts. */
  clear(): void {
    this.texts = [];
    this.sent = 0;
    this.post({ kind: "forget" });
    this.onMatches(NOTHING);
  }

  /** Look for this from now on; an empty pattern is no filter. */
  look(filter: Filter): void {
    this.filter = filter.pattern === "" ? undefined : filter;
    if (this.timer !== undefined) this.restart();
    if (this.filter === undefined) this.onMatches(NOTHING);
    else this.refresh();
  }

  /** One question at a time: what changes meanwhile is asked when it has been answered. */
  private refresh(): void {
    if (this.filter === undefined) return;
    this.isStale = this.timer !== undefined;
    if (this.isStale) return;
    this.post({ kind: "add", texts: this.texts.slice(this.sent) });
    this.sent = this.texts.length;
    this.post({ kind: "ask", ask: ++this.ask, filter: this.filter });
    this.timer = setTimeout(() => this.giveUp(), TIME_MAX_MS);
  }

  private post(question: Question): void {
    this.worker ??= this.start();
    this.worker.postMessage(question);
  }

  private start(): Worker {
    const worker = new Worker(new URL("./matching_worker.ts", import.meta.url), { type: "module" });
    worker.onmessage = ({ data }: MessageEvent<Answer>) => this.answered(data);
    return worker;
  }

  private answered(answer: Answer): void {
    if (answer.ask !== this.ask) return;
    this.stopTimer();
    if ("complaint" in answer) this.onMatches({ ...NOTHING, complaint: answer.complaint });
    else this.onMatches({ found: new Map(answer.found), complaint: undefined });
    if (this.isStale) this.refresh();
  }

  private giveUp(): void {
    this.restart();
    this.filter = undefined;
    const complaint = "This expression takes too long on these texts; try a simpler one.";
    this.onMatches({ ...NOTHING, complaint });
  }

  private restart(): void {
    this.worker?.terminate();
    this.worker = undefined;
    this.sent = 0;
    this.stopTimer();
  }

  private stopTimer(): void {
    clearTimeout(this.timer);
    this.timer = undefined;
    this.isStale &&= this.filter !== undefined;
  }
}
