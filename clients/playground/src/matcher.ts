// The filter over all completions, in a worker, within a time that a person is willing to wait.

import type { Filter, Span } from "./matching";
import type { Answer, Question } from "./matching_worker";

const TIME_MAX_MS = 1000;

export interface Matches {
  /** How many texts have been looked through. */
  examined: number;
  /** Where it is in each text that matches, by the text's number. */
  found: ReadonlyMap<number, Span[]>;
  /** What is wrong with the filter. */
  complaint: string | undefined;
}

/** Keeps the texts, and tells what the filter finds in them whenever either changes. */
export class Matcher {
  private worker: Worker | undefined;
  private timer: ReturnType<typeof setTimeout> | undefined;
  private readonly texts: string[] = [];
  private sent = 0;
  private filter: Filter | undefined;
  private examined = 0;
  private found = new Map<number, Span[]>();
  private ask = 0;
  private isAsking = false;

  constructor(private readonly onMatches: (matches: Matches) => void) {}

  /** Whether there is a filter that works. */
  get isFiltering(): boolean {
    return this.filter !== undefined;
  }

  /** Look through this text too; its number. */
  add(text: string): number {
    const number = this.texts.push(text) - 1;
    this.refresh();
    return number;
  }

  /** Drop all texts. */
  clear(): void {
    this.texts.length = 0;
    this.restart();
    this.tell();
  }

  /** Look for this from now on; an empty pattern is no filter. */
  look(filter: Filter): void {
    this.filter = filter.pattern === "" ? undefined : filter;
    if (this.isAsking) this.restart();
    this.forgetFindings();
    if (this.filter) this.question();
    else this.tell();
  }

  private refresh(): void {
    if (this.filter && !this.isAsking && this.examined < this.texts.length) this.question();
  }

  /** One question at a time: what is added meanwhile is asked about when it has been answered. */
  private question(): void {
    this.isAsking = true;
    this.post({ kind: "add", texts: this.texts.slice(this.sent) });
    this.sent = this.texts.length;
    this.post({ kind: "ask", ask: ++this.ask, filter: this.filter!, from: this.examined });
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
    if (answer.ask !== this.ask || !this.isAsking) return;
    if (answer.kind === "begun") {
      this.timer = setTimeout(() => this.giveUp(), TIME_MAX_MS);
      return;
    }
    clearTimeout(this.timer);
    this.isAsking = false;
    if (answer.kind === "complaint") return this.reject(answer.complaint);
    for (const [number, spans] of answer.found) this.found.set(number, spans);
    this.examined = answer.to;
    this.tell();
    this.refresh();
  }

  private giveUp(): void {
    this.restart();
    this.reject("This expression takes too long on these texts; try a simpler one.");
  }

  private reject(complaint: string): void {
    this.filter = undefined;
    this.forgetFindings();
    this.tell(complaint);
  }

  /** Begin with a fresh worker, which ends whatever the old one is at. */
  private restart(): void {
    this.worker?.terminate();
    this.worker = undefined;
    this.sent = 0;
    this.isAsking = false;
    clearTimeout(this.timer);
    this.forgetFindings();
  }

  private forgetFindings(): void {
    this.examined = 0;
    this.found = new Map();
  }

  private tell(complaint?: string): void {
    this.onMatches({ examined: this.examined, found: this.found, complaint });
  }
}
