// The settings of the page, and who wants to know when they change.

import type { Settings } from "./settings";

export class Store {
  private readonly listeners: ((settings: Readonly<Settings>) => void)[] = [];

  constructor(private current: Settings) {}

  get settings(): Readonly<Settings> {
    return this.current;
  }

  change(patch: Partial<Settings>): void {
    this.replace({ ...this.current, ...patch });
  }

  replace(settings: Settings): void {
    this.current = settings;
    for (const listener of this.listeners) listener(settings);
  }

  onChange(listener: (settings: Readonly<Settings>) => void): void {
    this.listeners.push(listener);
  }
}
