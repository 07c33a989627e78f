// The grammar of the streams, and what a whole stream adds up to.
//
//   generate   started (delta)* finished{sequence_count}, then OK
//   score      blocks that follow on one another up to the announced total, then OK
//
// Knows events only, nothing of calls. What breaks the grammar throws StreamBroken.
#ifndef LDA_SRC_READER_H_
#define LDA_SRC_READER_H_

#include <cstdint>
#include <map>
#include <set>
#include <utility>

#include "lda/completion.h"
#include "lda/v1/lda_service.pb.h"

namespace lda::internal {

/// Follows a generation event by event; sequences may come interleaved.
class GenerateReader {
 public:
  using Whole = Completions;

  /// Checks one event; false for one of a kind that only a newer contract knows.
  template <typename Event>
  bool Observe(const Event& event) {
    switch (event.event_case()) {
      case Event::kStarted:
        ObserveStarted(event.started());
        return true;
      case Event::kDelta:
        ObserveRunning(KeyOf(event.delta()));
        return true;
      case Event::kFinished:
        ObserveFinished(KeyOf(event.finished()));
        return true;
      default:
        return false;
    }
  }

  /// Checks that the stream may end here with OK.
  void ObserveEnd() const;

  /// Keeps the tokens and the end that an observed event brings.
  template <typename Event>
  void Add(Event* event) {
    if (event->has_delta()) AddDelta(event->mutable_delta());
    if (event->has_finished()) AddFinished(event->mutable_finished());
  }

  /// What the added events come to.
  Whole Take() { return std::move(whole_); }

  /// Whether tokens have passed.
  bool begun() const { return !seen_.empty(); }

 private:
  using Key = std::pair<int, uint32_t>;

  template <typename Part>
  static Key KeyOf(const Part& part) {
    return {part.role(), part.sequence_index()};
  }

  void ObserveStarted(const v1::Started& started);
  void ObserveRunning(const Key& key);
  void ObserveFinished(const Key& key);
  void AddDelta(v1::TokenDelta* delta);
  void AddFinished(v1::Finished* finished);

  bool started_ = false;
  std::set<Key> seen_;
  std::set<Key> finished_;
  std::map<Key, Completion> growing_;
  Whole whole_;
};

/// Follows the blocks of a scored text.
class ScoreReader {
 public:
  using Whole = ScoredText;

  bool Observe(const v1::ScoreResponse& block);
  void ObserveEnd() const;
  void Add(v1::ScoreResponse* block);
  Whole Take() { return std::move(whole_); }
  bool begun() const { return begun_; }

 private:
  bool begun_ = false;
  uint32_t scored_ = 0;
  uint32_t total_ = 0;
  Whole whole_;
};

}  // namespace lda::internal

#endif  // LDA_SRC_READER_H_
