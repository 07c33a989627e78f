#include "src/reader.h"

#include <iterator>
#include <string>

#include "lda/errors.h"

namespace lda::internal {
namespace {

void Check(bool holds, const std::string& finding) {
  if (holds) return;
  throw StreamBroken("The stream broke its contract: " + finding + ". Server and client may be of different versions.");
}

template <typename Messages, typename Message>
void MoveInto(std::vector<Message>* all, Messages* some) {
  all->insert(all->end(), std::make_move_iterator(some->begin()), std::make_move_iterator(some->end()));
}

std::string Count(size_t done, size_t of) { return std::to_string(done) + " of " + std::to_string(of); }

}  // namespace

void GenerateReader::ObserveStarted(const v1::Started& started) {
  Check(!started_, "it sent `started` twice");
  started_ = true;
  whole_.started = started;
}

void GenerateReader::ObserveRunning(const Key& key) {
  Check(started_, "it did not begin with `started`");
  const std::string index = std::to_string(key.second);
  Check(finished_.count(key) == 0, "sequence " + index + " went on after it had finished");
  seen_.insert(key);
  const uint32_t announced = whole_.started.sequence_count();
  Check(key.second < announced && seen_.size() <= announced, "sequence " + index + " is not one that it announced");
}

void GenerateReader::ObserveFinished(const Key& key) {
  ObserveRunning(key);
  finished_.insert(key);
}

void GenerateReader::ObserveEnd() const {
  Check(started_, "it ended before `started`");
  Check(finished_.size() == whole_.started.sequence_count(),
        "it ended when " + Count(finished_.size(), whole_.started.sequence_count()) + " sequences had finished");
}

void GenerateReader::AddDelta(v1::TokenDelta* delta) {
  Completion& completion = growing_[KeyOf(*delta)];
  completion.text += delta->text();
  MoveInto(&completion.tokens, delta->mutable_tokens());
}

void GenerateReader::AddFinished(v1::Finished* finished) {
  Completion completion = std::move(growing_[KeyOf(*finished)]);
  completion.finished = std::move(*finished);
  whole_.sequences.push_back(std::move(completion));
}

bool ScoreReader::Observe(const v1::ScoreResponse& block) {
  begun_ = true;
  Check(block.offset() == scored_,
        "a block begins at token " + std::to_string(block.offset()) + ", not at " + std::to_string(scored_));
  scored_ += block.tokens_size();
  total_ = block.total_token_count();
  return true;
}

void ScoreReader::ObserveEnd() const {
  Check(begun_, "it ended before its first block");
  Check(scored_ == total_, "it ended when " + Count(scored_, total_) + " tokens were scored");
}

void ScoreReader::Add(v1::ScoreResponse* block) {
  MoveInto(&whole_.tokens, block->mutable_tokens());
  MoveInto(&whole_.alpha_scores, block->mutable_alpha_scores());
}

}  // namespace lda::internal
