// The few helpers that plain DOM needs.

type Child = Node | string | undefined | false;

interface Properties {
  class?: string;
  text?: string;
  on?: { [E in keyof HTMLElementEventMap]?: (event: HTMLElementEventMap[E]) => void };
  /** Attributes as in HTML; false and undefined leave one out. */
  [attribute: string]: unknown;
}

/** Make an element. */
export function make<K extends keyof HTMLElementTagNameMap>(
  tag: K,
  properties: Properties = {},
  ...children: Child[]
): HTMLElementTagNameMap[K] {
  const element = document.createElement(tag);
  apply(element, properties);
  element.append(...children.filter((child): child is Node | string => child !== undefined && child !== false));
  return element;
}

/** Make an element of a drawing. */
export function draw(tag: string, attributes: Record<string, string | number>, ...children: (Node | string)[]) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag) as SVGElement;
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, String(value));
  element.append(...children);
  return element;
}

function apply(element: HTMLElement, properties: Properties): void {
  const { class: names, text, on, ...attributes } = properties;
  if (names) element.className = names;
  if (text !== undefined) element.textContent = text;
  for (const [type, listener] of Object.entries(on ?? {})) element.addEventListener(type, listener as EventListener);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : String(value));
  }
}

/** The element of the page with this id. */
export function byId<T extends HTMLElement = HTMLElement>(id: string): T {
  const element = document.getElementById(id);
  if (!element) throw new Error(`The page has no element #${id}.`);
  return element as T;
}

/** Put text onto the clipboard, on pages without a secure origin too; whether it worked. */
export async function copy(text: string): Promise<boolean> {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return copyBySelection(text);
  }
}

function copyBySelection(text: string): boolean {
  const field = make("textarea", { class: "offscreen" });
  field.value = text;
  // A modal dialog keeps the focus to itself.
  (document.querySelector("dialog[open]") ?? document.body).append(field);
  field.select();
  const worked = document.execCommand("copy");
  field.remove();
  return worked;
}

/** A number with a real minus sign. */
export function figure(value: number | undefined, digits = 2): string {
  if (value === undefined) return "–";
  const written = value.toFixed(digits);
  return Number(written) === 0 ? (0).toFixed(digits) : written.replace("-", "−");
}

/** An alpha as short as it can be written. */
export function alphaText(alpha: number): string {
  return String(Math.round(alpha * 1e4) / 1e4).replace("-", "−");
}
