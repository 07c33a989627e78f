// Dark or light: the system's choice, or the person's.

import { byId } from "./dom";

const KEY = "lda-playground-theme";

/** Make the switch work, and take up what was chosen before. */
export function bindTheme(): void {
  const select = byId<HTMLSelectElement>("theme");
  select.value = remembered() ?? "auto";
  apply(select.value);
  select.addEventListener("change", () => {
    apply(select.value);
    remember(select.value);
  });
}

function apply(theme: string): void {
  document.documentElement.dataset.theme = theme;
}

// Storage may be forbidden: then the choice lasts as long as the page.
function remembered(): string | null {
  try {
    return localStorage.getItem(KEY);
  } catch {
    return null;
  }
}

function remember(theme: string): void {
  try {
    localStorage.setItem(KEY, theme);
  } catch {
    return;
  }
}
