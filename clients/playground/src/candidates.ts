// Lists of candidates of one position, made at several alphas, as one list at one alpha.

import type { Candidate } from "@lda/client";

/**
 * The candidates of both lists, all with their amplified log-probability at `alpha`.
 *
 * @param first made at `alpha`, with at least one candidate.
 * @param others made at other alphas: their own amplified values are of no use here, but follow from the two models'.
 */
export function union(first: readonly Candidate[], others: readonly Candidate[], alpha: number): Candidate[] {
  const found = new Map(first.map((candidate) => [candidate.id, candidate]));
  const normalizer = normalizerOf(first, alpha);
  for (const candidate of others) {
    if (found.has(candidate.id)) continue;
    const logit = amplifiedLogit(candidate, alpha);
    const isKnown = logit !== undefined && normalizer !== undefined;
    found.set(candidate.id, { ...candidate, amplifiedLogprob: isKnown ? logit - normalizer : undefined });
  }
  return [...found.values()];
}

/** Amplified logits need one number to become log-probabilities, the same for all tokens of a position. */
function normalizerOf(candidates: readonly Candidate[], alpha: number): number | undefined {
  const logit = candidates[0] && amplifiedLogit(candidates[0], alpha);
  return logit === undefined ? undefined : logit - candidates[0]!.amplifiedLogprob!;
}

function amplifiedLogit({ afterLogprob, beforeLogprob }: Candidate, alpha: number): number | undefined {
  if (afterLogprob === undefined || beforeLogprob === undefined) return undefined;
  return afterLogprob + alpha * (afterLogprob - beforeLogprob);
}
