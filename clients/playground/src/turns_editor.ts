// The turns of a conversation, as fields.

import { byId, make } from "./dom";
import type { Turn } from "./settings";

const ROLES = ["system", "user", "assistant"];

export class TurnsEditor {
  private readonly list = byId<HTMLOListElement>("turns");
  private turns: Turn[] = [];

  constructor(private readonly onTurns: (turns: Turn[]) => void) {
    byId("add-turn").addEventListener("click", () => {
      const role = this.turns.at(-1)?.role === "user" ? "assistant" : "user";
      this.add([...this.turns, { role, content: "" }], this.turns.length);
    });
    byId("add-system").addEventListener("click", () => {
      this.add([{ role: "system", content: "" }, ...this.turns], 0);
    });
  }

  /** Show these turns; what is being written in is left alone. */
  show(turns: Turn[]): void {
    const isSameShape =
      turns.length === this.turns.length && turns.every(({ role }, i) => role === this.turns[i]!.role);
    this.turns = turns;
    byId("add-system").hidden = turns[0]?.role === "system";
    if (!isSameShape) this.list.replaceChildren(...turns.map((turn, index) => this.item(turn, index)));
    for (const [index, field] of this.fields().entries()) {
      if (field.value !== turns[index]!.content) field.value = turns[index]!.content;
    }
  }

  private add(turns: Turn[], index: number): void {
    this.onTurns(turns);
    this.fields()[index]?.focus();
  }

  private fields(): HTMLTextAreaElement[] {
    return [...this.list.querySelectorAll("textarea")];
  }

  private item(turn: Turn, index: number): HTMLLIElement {
    const change = (patch: Partial<Turn>) =>
      this.onTurns(this.turns.map((each, at) => (at === index ? { ...each, ...patch } : each)));
    const content = make("textarea", { rows: 2, spellcheck: "false", "aria-label": `Turn ${index + 1}` });
    content.value = turn.content;
    content.addEventListener("input", () => change({ content: content.value }));
    const remove = make("button", {
      type: "button",
      class: "quiet",
      "aria-label": `Remove turn ${index + 1}`,
      text: "×",
    });
    remove.addEventListener("click", () => this.onTurns(this.turns.filter((_, at) => at !== index)));
    remove.hidden = this.turns.length === 1;
    return make(
      "li",
      {},
      this.role(turn, index, (role) => change({ role })),
      remove,
      content,
    );
  }

  private role({ role }: Turn, index: number, onRole: (role: string) => void): HTMLSelectElement {
    const names = ROLES.includes(role) ? ROLES : [...ROLES, role];
    const options = names.map((name) => make("option", { value: name, selected: name === role, text: name }));
    const select = make("select", { "aria-label": `Role of turn ${index + 1}` }, ...options);
    select.addEventListener("change", () => onRole(select.value));
    return select;
  }
}
