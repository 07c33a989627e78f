// The verbs, against a real server that plays scripts.
#include "lda/client.h"

#include <gtest/gtest.h>

#include <chrono>
#include <future>
#include <stdexcept>
#include <string>
#include <utility>

#include "tests/scripted_server.h"

namespace lda {
namespace {

using std::chrono::milliseconds;
using testing::DeltaEvent;
using testing::FinishedEvent;
using testing::ReasonStatus;
using testing::ScriptedServer;
using testing::StartedEvent;
using testing::UnknownEvent;

v1::GenerateLDARequest Request() {
  v1::GenerateLDARequest request;
  *request.mutable_prompt() = Text("hi");
  return request;
}

class ClientTest : public ::testing::Test {
 protected:
  ScriptedServer server_;
  Client client_{server_.target()};
};

// A range-for sees every event in order, and the pieces add up.
TEST_F(ClientTest, GenerateStreamsEvents) {
  server_.events = {StartedEvent(1), DeltaEvent("a"), DeltaEvent("b"), FinishedEvent()};
  std::string text;
  int events = 0;
  for (const auto& event : client_.Generate(Request())) {
    text += event.delta().text();
    ++events;
  }
  EXPECT_EQ(text, "ab");
  EXPECT_EQ(events, 4);
}

// A stream that has ended stays ended.
TEST_F(ClientTest, NextAfterTheEndIsEmpty) {
  server_.events = {StartedEvent(1), FinishedEvent()};
  GenerateStream stream = client_.Generate(Request());
  EXPECT_TRUE(stream.Next() && stream.Next());
  EXPECT_FALSE(stream.Next());
  EXPECT_FALSE(stream.Next());
}

// A completion holds the text and the tokens of its sequence; they come in the order in which they finished.
TEST_F(ClientTest, CompleteGathers) {
  server_.events = {StartedEvent(2),  DeltaEvent("a", 0), DeltaEvent("x", 1), DeltaEvent("y", 1),
                    FinishedEvent(1), DeltaEvent("b", 0), FinishedEvent(0)};
  const Completions whole = client_.Complete(Request());
  EXPECT_EQ(whole.started.seed(), 7u);
  ASSERT_EQ(whole.sequences.size(), 2u);
  EXPECT_EQ(whole.sequences[0].finished.sequence_index(), 1u);
  EXPECT_EQ(whole.sequences[0].text, "xy");
  EXPECT_EQ(whole.sequences[0].tokens.size(), 2u);
  EXPECT_EQ(whole.sequences[1].text, "ab");
  EXPECT_EQ(whole.sequences[1].finished.reason(), v1::FINISH_REASON_EOS);
}

// Reading `started` first takes nothing from Gather(); reading tokens does, and is refused.
TEST_F(ClientTest, GatherNeedsTheTokens) {
  server_.events = {StartedEvent(1), DeltaEvent("a"), FinishedEvent()};
  GenerateStream begun = client_.Generate(Request());
  begun.Next();
  EXPECT_EQ(begun.Gather().started.seed(), 7u);

  GenerateStream read = client_.Generate(Request());
  read.Next(), read.Next();
  EXPECT_THROW(read.Gather(), std::logic_error);
}

// The sequences of both models come in one stream, told apart by role.
TEST_F(ClientTest, GenerateBothStreams) {
  auto before = FinishedEvent();
  before.mutable_finished()->set_role(v1::MODEL_ROLE_BEFORE);
  server_.events = {StartedEvent(2), DeltaEvent("a"), FinishedEvent(), before};
  const Completions whole = client_.GenerateBoth({}).Gather();
  ASSERT_EQ(whole.sequences.size(), 2u);
  EXPECT_EQ(whole.sequences[0].text, "a");
  EXPECT_EQ(whole.sequences[1].finished.role(), v1::MODEL_ROLE_BEFORE);
}

// The blocks of a score add up to the scored text.
TEST_F(ClientTest, ScoreGathers) {
  server_.blocks.resize(2);
  for (uint32_t i = 0; i < 2; ++i) {
    server_.blocks[i].set_offset(i);
    server_.blocks[i].add_tokens()->set_id(i);
    server_.blocks[i].set_total_token_count(2);
  }
  server_.blocks[1].add_alpha_scores()->set_logprob(-3);
  const ScoredText scored = client_.Score({}).Gather();
  ASSERT_EQ(scored.tokens.size(), 2u);
  EXPECT_EQ(scored.tokens[1].id(), 1u);
  EXPECT_EQ(scored.alpha_scores.at(0).logprob(), -3);
}

// The short calls hand out the response as it is.
TEST_F(ClientTest, ShortCallsAnswer) {
  EXPECT_TRUE(client_.TokenizerCompat().compatible());
  EXPECT_EQ(client_.ModelPair().device(), "cpu");
}

// An event of a kind that only a newer server knows is skipped.
TEST_F(ClientTest, SkipsUnknownEvents) {
  server_.events = {UnknownEvent(), StartedEvent(1), UnknownEvent(), FinishedEvent()};
  GenerateStream stream = client_.Generate(Request());
  EXPECT_TRUE(stream.Next()->has_started());
  EXPECT_TRUE(stream.Next()->has_finished());
  EXPECT_FALSE(stream.Next());
}

// OK before every sequence has finished is no end.
TEST_F(ClientTest, UnfinishedStreamIsBroken) {
  server_.events = {StartedEvent(2), FinishedEvent(0)};
  GenerateStream stream = client_.Generate(Request());
  EXPECT_TRUE(stream.Next() && stream.Next());
  EXPECT_THROW(stream.Next(), StreamBroken);
  EXPECT_FALSE(stream.Next());
}

// A stream that goes on against the grammar is left: the server sees it cancelled.
TEST_F(ClientTest, BrokenStreamIsCancelled) {
  server_.events = {DeltaEvent("a")};
  server_.hold = true;
  GenerateStream stream = client_.Generate(Request());
  try {
    stream.Next();
    ADD_FAILURE() << "no error";
  } catch (const StreamBroken& error) {
    EXPECT_FALSE(error.code());
  }
  EXPECT_TRUE(server_.WaitCancelled(1));
}

// Events that came before an error are delivered before it.
TEST_F(ClientTest, ErrorsFollowTheEvents) {
  server_.events = {StartedEvent(1), DeltaEvent("a")};
  server_.status = ReasonStatus(grpc::StatusCode::RESOURCE_EXHAUSTED, "SLOW_CONSUMER");
  GenerateStream stream = client_.Generate(Request());
  EXPECT_TRUE(stream.Next() && stream.Next());
  EXPECT_THROW(stream.Next(), SlowConsumer);
  EXPECT_FALSE(stream.Next());
}

// Leaving a loop early cancels the call on the server.
TEST_F(ClientTest, DestructionCancels) {
  server_.events = {StartedEvent(1), DeltaEvent("a")};
  server_.hold = true;
  for (const auto& event : client_.Generate(Request())) {
    if (event.has_delta()) break;
  }
  EXPECT_TRUE(server_.WaitCancelled(1));
}

// A stream that is overwritten by another is left too; one that is moved is not.
TEST_F(ClientTest, MovingKeepsAndOverwritingCancels) {
  server_.events = {StartedEvent(1)};
  server_.hold = true;
  GenerateStream first = client_.Generate(Request());
  GenerateStream moved = std::move(first);
  EXPECT_TRUE(moved.Next()->has_started());
  moved = client_.Generate(Request());
  EXPECT_TRUE(server_.WaitCancelled(1));
  EXPECT_TRUE(moved.Next()->has_started());
}

// Another thread may cancel a stream that waits; reading ends without an error.
TEST_F(ClientTest, CancelWakesTheReader) {
  server_.events = {StartedEvent(1)};
  server_.hold = true;
  GenerateStream stream = client_.Generate(Request());
  stream.Next();
  auto waiting = std::async(std::launch::async, [&] { return stream.Next().has_value(); });
  stream.Cancel();
  EXPECT_FALSE(waiting.get());
  EXPECT_TRUE(server_.WaitCancelled(1));
}

// What was cancelled is never taken for a whole answer.
TEST_F(ClientTest, GatherOfACancelledStreamIsBroken) {
  server_.events = {StartedEvent(1), DeltaEvent("a")};
  server_.hold = true;
  GenerateStream stream = client_.Generate(Request());
  stream.Cancel();
  EXPECT_THROW(stream.Gather(), StreamBroken);
}

// The deadline of the call, or of the client, ends a stream and a short call.
TEST_F(ClientTest, DeadlinesEndCalls) {
  server_.hold = true;
  EXPECT_THROW(client_.Generate(Request(), {milliseconds(50)}).Next(), DeadlineExceeded);
  EXPECT_THROW(client_.ModelPair({milliseconds(50)}), DeadlineExceeded);
  Options options;
  options.timeouts.total = options.timeouts.lookup = milliseconds(50);
  const Client hurried(server_.target(), options);
  EXPECT_THROW(hurried.Complete(Request()), DeadlineExceeded);
  EXPECT_THROW(hurried.TokenizerCompat(), DeadlineExceeded);
}

// UNAVAILABLE before the first event is tried four times in all.
TEST_F(ClientTest, RetriesUnavailable) {
  server_.events = {StartedEvent(1), FinishedEvent()};
  server_.refusals = 3;
  EXPECT_EQ(client_.Complete(Request()).sequences.size(), 1u);
  EXPECT_EQ(server_.calls(), 4);
}

// The fourth refusal is the caller's.
TEST_F(ClientTest, GivesUpAfterFourAttempts) {
  server_.refusals = 5;
  EXPECT_THROW(client_.Complete(Request()), Loading);
  EXPECT_EQ(server_.calls(), 4);
}

// A long prompt is tried again like a short one; by itself, gRPC gives up the retry of what is above 256 KiB.
TEST_F(ClientTest, RetriesLongPrompts) {
  server_.events = {StartedEvent(1), FinishedEvent()};
  server_.refusals = 1;
  auto request = Request();
  request.mutable_prompt()->set_text(std::string(1 << 20, 'x'));
  EXPECT_EQ(client_.Complete(request).sequences.size(), 1u);
}

// Nothing but UNAVAILABLE before the first event is tried again.
TEST_F(ClientTest, RetriesNothingElse) {
  server_.status = ReasonStatus(grpc::StatusCode::RESOURCE_EXHAUSTED, "QUEUE_FULL");
  EXPECT_THROW(client_.Complete(Request()), QueueFull);
  EXPECT_EQ(server_.calls(), 1);
  server_.events = {StartedEvent(1)};
  server_.status = ReasonStatus(grpc::StatusCode::UNAVAILABLE, "WORKER_DIED");
  EXPECT_THROW(client_.Complete(Request()), WorkerDied);
  EXPECT_EQ(server_.calls(), 2);
}

// A message of more than gRPC's default of 4 MiB arrives.
TEST_F(ClientTest, TakesLargeMessages) {
  server_.events = {StartedEvent(1), DeltaEvent(std::string(5 << 20, 'x')), FinishedEvent()};
  EXPECT_EQ(client_.Complete(Request()).sequences.at(0).text.size(), size_t{5 << 20});
}

// The token goes with every call, over plain text too; no token, no header.
TEST_F(ClientTest, SendsTheToken) {
  Options options;
  options.token = "secret";
  const Client client(server_.target(), options);
  client.ModelPair();
  EXPECT_EQ(server_.Metadata("authorization"), "Bearer secret");
  EXPECT_EQ(server_.Metadata("user-agent").rfind("lda-client-cpp/", 0), 0u);
  client_.ModelPair();
  EXPECT_EQ(server_.Metadata("authorization"), "");
}

// A stream holds on to what it needs of its client.
TEST_F(ClientTest, StreamsOutliveTheClient) {
  server_.events = {StartedEvent(1), FinishedEvent()};
  GenerateStream stream = Client(server_.target()).Generate(Request());
  EXPECT_EQ(stream.Gather().sequences.size(), 1u);
}

// Nobody at the target is ServerAway: after the retries of a call, after `connect` where a connection is waited for.
TEST(Client, ServerAway) {
  const std::string nobody = "127.0.0.1:1";
  EXPECT_THROW(Client(nobody).Generate(Request()).Next(), lda::ServerAway);
  EXPECT_THROW(Client(nobody).ModelPair(), lda::ServerAway);
  Options options;
  options.timeouts.connect = milliseconds(50);
  EXPECT_THROW(Client(nobody, options).Generate(Request()), lda::ServerAway);
}

// Options that cannot be used are refused before anything is sent.
TEST(Client, RefusesUnusableOptions) {
  Options token;
  token.token = "line\nbreak";
  EXPECT_THROW(Client("127.0.0.1:1", token), std::invalid_argument);
  Options path;
  path.tls = Tls{"/etc/ca.pem", "", "", ""};
  EXPECT_THROW(Client("127.0.0.1:1", path), std::invalid_argument);
  Options half;
  half.tls = Tls{"", "-----BEGIN CERTIFICATE-----", "", ""};
  EXPECT_THROW(Client("127.0.0.1:1", half), std::invalid_argument);
}

// A prompt has one of three forms.
TEST(Prompt, HasThreeForms) {
  EXPECT_EQ(Text("hi").text(), "hi");
  EXPECT_EQ(Tokens({4, 2}).tokens().ids(1), 2u);
  const v1::Prompt chat = Chat({{"system", "a"}, {"user", "b"}}, true);
  EXPECT_EQ(chat.chat().messages(1).content(), "b");
  EXPECT_TRUE(chat.chat().continue_final_message());
}

}  // namespace
}  // namespace lda
