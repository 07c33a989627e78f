// Where token sequences part.

export interface Track {
  ids: readonly number[];
  ended: boolean;
}

export type Divergence =
  /** They agree on this many tokens, and more may come. */
  | { kind: "open"; shared: number }
  /** They differ first at this position. */
  | { kind: "parted"; at: number }
  /** They ended alike. */
  | { kind: "same"; shared: number };

/**
 * Compare sequences that may still grow. One that ended early parts from the others where they go on.
 *
 * @param shared how many tokens they are known to agree on.
 */
export function divergence(tracks: readonly Track[], shared = 0): Divergence {
  for (let at = shared; ; at++) {
    const ids = new Set(tracks.map((track) => track.ids[at] ?? (track.ended ? "end" : "open")));
    const known = [...ids].filter((id) => id !== "open");
    if (known.length > 1) return { kind: "parted", at };
    if (ids.has("open")) return { kind: "open", shared: at };
    if (ids.has("end")) return { kind: "same", shared: at };
  }
}
