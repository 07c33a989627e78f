#include "lda/stream.h"

#include <utility>

#include "src/call.h"

namespace lda {

template <typename Event, typename Whole>
Stream<Event, Whole>::Stream(std::unique_ptr<internal::Call<Event>> call) : call_(std::move(call)) {}

template <typename Event, typename Whole>
Stream<Event, Whole>::Stream(Stream&& other) noexcept = default;

template <typename Event, typename Whole>
Stream<Event, Whole>& Stream<Event, Whole>::operator=(Stream&& other) noexcept = default;

template <typename Event, typename Whole>
Stream<Event, Whole>::~Stream() = default;

template <typename Event, typename Whole>
std::optional<Event> Stream<Event, Whole>::Next() {
  return call_->Next();
}

template <typename Event, typename Whole>
void Stream<Event, Whole>::Cancel() {
  call_->Cancel();
}

template <typename Event, typename Whole>
Whole Stream<Event, Whole>::Gather() {
  return call_->Gather();
}

template class Stream<v1::GenerateLDAResponse, Completions>;
template class Stream<v1::GenerateBothResponse, Completions>;
template class Stream<v1::ScoreResponse, ScoredText>;

}  // namespace lda
