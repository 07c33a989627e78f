// Tokens as text. A token is bytes, and may hold part of a character.

/** Decodes the pieces of one sequence, one after the other. */
export class PieceDecoder {
  private readonly decoder = new TextDecoder("utf-8", { ignoreBOM: true });

  /** The characters that this piece completes; empty if it completes none. */
  next(piece: Uint8Array): string {
    return this.decoder.decode(piece, { stream: true });
  }
}

/** A single piece for people: spaces and line breaks made visible, loose bytes in hexadecimal. */
export function label(piece: Uint8Array): string {
  const text = wholeText(piece);
  if (text === undefined) return [...piece].map((byte) => `⟨${byte.toString(16).padStart(2, "0")}⟩`).join("");
  if (text === "") return "⟨empty⟩";
  return text.replace(/^ | $/g, "␣").replaceAll("\n", "↵").replaceAll("\t", "⇥");
}

/** The text of a piece; undefined if it is not whole characters. */
export function wholeText(piece: Uint8Array): string | undefined {
  try {
    return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(piece);
  } catch {
    return undefined;
  }
}

export const TINT_STEPS = 6;
const NATS_PER_STEP = 0.75;

/** How strongly a token is tinted, from -TINT_STEPS (training made it less likely) to TINT_STEPS (more likely). */
export function tint(afterLogprob: number | undefined, beforeLogprob: number | undefined): number {
  if (afterLogprob === undefined || beforeLogprob === undefined) return 0;
  const steps = Math.round((afterLogprob - beforeLogprob) / NATS_PER_STEP);
  return Math.min(Math.max(steps, -TINT_STEPS), TINT_STEPS) || 0;
}
