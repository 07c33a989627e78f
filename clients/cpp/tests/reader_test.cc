// The grammar of the streams, without a server.
#include "src/reader.h"

#include <gtest/gtest.h>

#include <vector>

#include "lda/errors.h"
#include "tests/scripted_server.h"

namespace lda::internal {
namespace {

using testing::DeltaEvent;
using testing::FinishedEvent;
using testing::StartedEvent;
using testing::UnknownEvent;
using Events = std::vector<v1::GenerateLDAResponse>;

void Follow(const Events& events) {
  GenerateReader reader;
  for (const auto& event : events) reader.Observe(event);
  reader.ObserveEnd();
}

v1::ScoreResponse Block(uint32_t offset, int tokens, uint32_t total) {
  v1::ScoreResponse block;
  block.set_offset(offset);
  block.set_total_token_count(total);
  for (int i = 0; i < tokens; ++i) block.add_tokens();
  return block;
}

void FollowBlocks(const std::vector<v1::ScoreResponse>& blocks) {
  ScoreReader reader;
  for (const auto& block : blocks) reader.Observe(block);
  reader.ObserveEnd();
}

// Sequences may come interleaved, and one may finish without a delta.
TEST(GenerateReader, AcceptsWholeStreams) {
  EXPECT_NO_THROW(Follow({StartedEvent(1), DeltaEvent("a"), FinishedEvent()}));
  EXPECT_NO_THROW(Follow({StartedEvent(2), DeltaEvent("a", 1), DeltaEvent("b", 0), FinishedEvent(1), DeltaEvent("c", 0),
                          FinishedEvent(0)}));
  EXPECT_NO_THROW(Follow({StartedEvent(1), FinishedEvent()}));
}

// A stream of GenerateBoth has two sequences of each index, told apart by role.
TEST(GenerateReader, TellsRolesApart) {
  auto before = FinishedEvent();
  before.mutable_finished()->set_role(v1::MODEL_ROLE_BEFORE);
  EXPECT_NO_THROW(Follow({StartedEvent(2), FinishedEvent(), before}));
}

// What goes against `started (delta)* finished{sequence_count}` is StreamBroken.
TEST(GenerateReader, RefusesWhatBreaksTheGrammar) {
  const std::vector<Events> broken = {
      {},
      {StartedEvent(1)},
      {StartedEvent(1), DeltaEvent("a")},
      {StartedEvent(2), FinishedEvent(0)},
      {DeltaEvent("a"), FinishedEvent()},
      {StartedEvent(1), StartedEvent(1), FinishedEvent()},
      {StartedEvent(1), FinishedEvent(), DeltaEvent("a")},
      {StartedEvent(2), FinishedEvent(), FinishedEvent()},
      {StartedEvent(1), FinishedEvent(0), FinishedEvent(1)},
      {StartedEvent(1), DeltaEvent("a", 0), DeltaEvent("b", 1)},
      {StartedEvent(1), FinishedEvent(5)},
  };
  for (size_t i = 0; i < broken.size(); ++i) EXPECT_THROW(Follow(broken[i]), StreamBroken) << "stream " << i;
}

// An event of a kind that only a newer contract knows is reported as such wherever it comes, and harms nothing.
TEST(GenerateReader, TellsUnknownEvents) {
  EXPECT_FALSE(GenerateReader().Observe(UnknownEvent()));
  EXPECT_NO_THROW(Follow({UnknownEvent(), StartedEvent(1), UnknownEvent(), FinishedEvent(), UnknownEvent()}));
}

// The blocks of a score follow on one another, up to the announced total.
TEST(ScoreReader, ChecksBlocks) {
  EXPECT_NO_THROW(FollowBlocks({Block(0, 2, 3), Block(2, 1, 3)}));
  EXPECT_THROW(FollowBlocks({}), StreamBroken);
  EXPECT_THROW(FollowBlocks({Block(0, 2, 3)}), StreamBroken);
  EXPECT_THROW(FollowBlocks({Block(0, 2, 3), Block(1, 1, 3)}), StreamBroken);
  EXPECT_THROW(FollowBlocks({Block(1, 2, 3)}), StreamBroken);
}

}  // namespace
}  // namespace lda::internal
