// Streams of events: iterate them, leave them early, or gather them whole.
#ifndef LDA_STREAM_H_
#define LDA_STREAM_H_

#include <cstddef>
#include <iterator>
#include <memory>
#include <optional>
#include <utility>

#include "lda/completion.h"
#include "lda/v1/lda_service.pb.h"

namespace lda {

namespace internal {
template <typename Event>
class Call;
}  // namespace internal

/// The events of one call, which is under way.
///
///     for (const auto& event : client.Generate(request)) std::cout << event.delta().text();
///
/// Destruction cancels the call on the server if it is still under way. One thread reads; any thread may `Cancel()`.
/// Errors of the call are thrown by reading, as an `LdaClientError`.
template <typename Event, typename Whole>
class Stream {
 public:
  class Iterator;
  struct End {};

  explicit Stream(std::unique_ptr<internal::Call<Event>> call);
  Stream(Stream&& other) noexcept;
  Stream& operator=(Stream&& other) noexcept;
  ~Stream();

  /// Waits for the next event; empty once the stream has ended or was cancelled.
  std::optional<Event> Next();

  /// Cancels the call on the server if it is still under way; reading then ends without an error. From any thread.
  void Cancel();

  /// Reads the stream to its end and returns what it adds up to.
  ///
  /// Throws std::logic_error if tokens were already read, StreamBroken if the stream was cancelled before its end.
  Whole Gather();

  Iterator begin() { return Iterator(this); }
  End end() { return {}; }

 private:
  std::unique_ptr<internal::Call<Event>> call_;
};

/// Single pass, as the stream itself.
template <typename Event, typename Whole>
class Stream<Event, Whole>::Iterator {
 public:
  using iterator_category = std::input_iterator_tag;
  using value_type = Event;
  using difference_type = std::ptrdiff_t;
  using pointer = Event*;
  using reference = Event&;

  explicit Iterator(Stream* stream) : stream_(stream), event_(stream->Next()) {}

  Event& operator*() { return *event_; }
  Event* operator->() { return &*event_; }
  Iterator& operator++() {
    event_ = stream_->Next();
    return *this;
  }
  bool operator!=(End) const { return event_.has_value(); }
  bool operator==(End) const { return !event_.has_value(); }

 private:
  Stream* stream_;
  std::optional<Event> event_;
};

using GenerateStream = Stream<v1::GenerateLDAResponse, Completions>;
using GenerateBothStream = Stream<v1::GenerateBothResponse, Completions>;
using ScoreStream = Stream<v1::ScoreResponse, ScoredText>;

extern template class Stream<v1::GenerateLDAResponse, Completions>;
extern template class Stream<v1::GenerateBothResponse, Completions>;
extern template class Stream<v1::ScoreResponse, ScoredText>;

}  // namespace lda

#endif  // LDA_STREAM_H_
