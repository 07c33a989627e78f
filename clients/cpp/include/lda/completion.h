// What whole streams add up to.
#ifndef LDA_COMPLETION_H_
#define LDA_COMPLETION_H_

#include <string>
#include <vector>

#include "lda/v1/lda_service.pb.h"

namespace lda {

/// One finished sequence.
struct Completion {
  /// Its text, without the stop string.
  std::string text;
  /// Its tokens, with log-probabilities and diagnostics as asked for.
  std::vector<v1::Token> tokens;
  /// How it ended: index, role, reason, what matched, scores and usage.
  v1::Finished finished;
};

/// Every sequence of one generation.
struct Completions {
  /// The first event: generation id, seed and alpha in force, prompt length.
  v1::Started started;
  /// The sequences, in the order in which they finished.
  std::vector<Completion> sequences;
};

/// A continuation scored at every position.
struct ScoredText {
  /// Its tokens, each with diagnostics.
  std::vector<v1::Token> tokens;
  /// One entry for each of `ScoreRequest.score_alphas`, in that order.
  std::vector<v1::AlphaScore> alpha_scores;
};

}  // namespace lda

#endif  // LDA_COMPLETION_H_
