// Which error stands for which status, without a server.
#include "lda/errors.h"

#include <gtest/gtest.h>

#include <chrono>
#include <functional>
#include <map>
#include <set>
#include <string>
#include <typeindex>
#include <typeinfo>

#include "google/rpc/error_details.pb.h"
#include "lda/v1/lda_service.pb.h"
#include "src/status.h"
#include "tests/scripted_server.h"

namespace lda::internal {
namespace {

using grpc::StatusCode;
using testing::ReasonStatus;
using testing::RichStatus;

// Hands the error of a status to `look`.
void WithError(const grpc::Status& status, const std::function<void(const LdaClientError&)>& look,
               bool answered = false) {
  try {
    ThrowError(status, "host:1", answered);
  } catch (const LdaClientError& error) {
    look(error);
  }
}

std::type_index ClassOf(const grpc::Status& status) {
  std::type_index kind = typeid(void);
  WithError(status, [&](const LdaClientError& error) { kind = typeid(error); });
  return kind;
}

// Every reason of the contract has a class of its own, whatever code it comes with.
TEST(Errors, EveryReasonHasItsClass) {
  const std::map<std::string, std::type_index> kinds = {
      {"VALIDATION_FAILED", typeid(ValidationFailed)},
      {"CONTEXT_EXCEEDED", typeid(ContextExceeded)},
      {"PROMPT_UNUSABLE", typeid(PromptUnusable)},
      {"NO_CHAT_TEMPLATE", typeid(NoChatTemplate)},
      {"LIMIT_EXCEEDED", typeid(LimitExceeded)},
      {"TOKENIZERS_INCOMPATIBLE", typeid(TokenizersIncompatible)},
      {"QUEUE_FULL", typeid(QueueFull)},
      {"SLOW_CONSUMER", typeid(SlowConsumer)},
      {"LOADING", typeid(Loading)},
      {"DRAINING", typeid(Draining)},
      {"WORKER_DIED", typeid(WorkerDied)},
      {"OUT_OF_MEMORY", typeid(OutOfMemory)},
      {"ABORTED", typeid(Aborted)},
      {"INTERNAL", typeid(InternalServerError)},
      {"DEADLINE_TOO_SHORT", typeid(DeadlineTooShort)},
      {"CALLER_LIMIT", typeid(CallerLimit)},
      {"UNAUTHENTICATED", typeid(Unauthenticated)},
      {"PERMISSION_DENIED", typeid(PermissionDenied)},
      {"UNKNOWN_GENERATION", typeid(UnknownGeneration)},
  };
  const auto* reasons = v1::ErrorReason_descriptor();
  EXPECT_EQ(kinds.size(), static_cast<size_t>(reasons->value_count() - 1)) << "a reason without a class";
  for (const auto& [reason, kind] : kinds) {
    ASSERT_NE(reasons->FindValueByName("ERROR_REASON_" + reason), nullptr) << reason;
    EXPECT_EQ(ClassOf(ReasonStatus(StatusCode::UNKNOWN, reason)), kind) << reason;
  }
}

// Without a reason that is known here, the code decides.
TEST(Errors, EveryCodeHasItsClass) {
  const std::map<StatusCode, std::type_index> kinds = {
      {StatusCode::INVALID_ARGUMENT, typeid(RequestRejected)},
      {StatusCode::FAILED_PRECONDITION, typeid(RequestRejected)},
      {StatusCode::OUT_OF_RANGE, typeid(RequestRejected)},
      {StatusCode::NOT_FOUND, typeid(RequestRejected)},
      {StatusCode::ALREADY_EXISTS, typeid(RequestRejected)},
      {StatusCode::UNIMPLEMENTED, typeid(RequestRejected)},
      {StatusCode::UNAUTHENTICATED, typeid(AccessDenied)},
      {StatusCode::PERMISSION_DENIED, typeid(AccessDenied)},
      {StatusCode::UNAVAILABLE, typeid(Unavailable)},
      {StatusCode::RESOURCE_EXHAUSTED, typeid(Exhausted)},
      {StatusCode::DEADLINE_EXCEEDED, typeid(DeadlineExceeded)},
      {StatusCode::ABORTED, typeid(Aborted)},
      {StatusCode::CANCELLED, typeid(Aborted)},
      {StatusCode::INTERNAL, typeid(InternalServerError)},
      {StatusCode::UNKNOWN, typeid(InternalServerError)},
      {StatusCode::DATA_LOSS, typeid(InternalServerError)},
  };
  EXPECT_EQ(kinds.size(), 16u) << "a code without a class";
  for (const auto& [code, kind] : kinds) {
    EXPECT_EQ(ClassOf(ReasonStatus(code, "OF_A_NEWER_SERVER")), kind) << CodeName(code);
    if (code == StatusCode::UNAVAILABLE) continue;
    EXPECT_EQ(ClassOf(grpc::Status(code, "")), kind) << CodeName(code);
  }
  EXPECT_EQ(ClassOf(grpc::Status(static_cast<StatusCode>(99), "")), typeid(LdaClientError));
}

// UNAVAILABLE without a reason comes from no LDA server, and the message says what to do.
TEST(Errors, NobodyAnswered) {
  const grpc::Status refused(StatusCode::UNAVAILABLE, "connection refused");
  EXPECT_EQ(ClassOf(refused), typeid(ServerAway));
  WithError(refused, [](const LdaClientError& error) {
    EXPECT_NE(std::string(error.what()).find("host:1 (connection refused): start it with"), std::string::npos);
  });
  const auto look = [](const LdaClientError& error) {
    EXPECT_NE(std::string(error.what()).find("was lost"), std::string::npos);
  };
  WithError(refused, look, true);
}

// A reason of another domain is none of ours.
TEST(Errors, ReadsItsOwnDomainOnly) {
  const grpc::Status status = ReasonStatus(StatusCode::RESOURCE_EXHAUSTED, "QUEUE_FULL", "elsewhere.com");
  EXPECT_EQ(ClassOf(status), typeid(Exhausted));
  WithError(status, [](const LdaClientError& error) { EXPECT_FALSE(error.reason()); });
}

// Everything that a status carries is on the error.
TEST(Errors, CarryTheFacts) {
  google::rpc::ErrorInfo info;
  info.set_domain("lda.v1");
  info.set_reason("VALIDATION_FAILED");
  (*info.mutable_metadata())["limit"] = "9";
  google::rpc::BadRequest bad;
  bad.add_field_violations()->set_field("sampling.top_p");
  bad.mutable_field_violations(0)->set_description("at most 1");
  google::rpc::RetryInfo retry;
  retry.mutable_retry_delay()->set_seconds(1);
  retry.mutable_retry_delay()->set_nanos(500'000'000);

  int looked = 0;
  WithError(RichStatus(StatusCode::INVALID_ARGUMENT, "no", {&info, &bad, &retry}), [&](const LdaClientError& error) {
    ++looked;
    EXPECT_STREQ(error.what(), "no");
    EXPECT_EQ(error.code(), StatusCode::INVALID_ARGUMENT);
    EXPECT_EQ(error.reason(), "VALIDATION_FAILED");
    EXPECT_EQ(error.metadata().at("limit"), "9");
    ASSERT_EQ(error.violations().size(), 1u);
    EXPECT_EQ(error.violations()[0].field, "sampling.top_p");
    EXPECT_EQ(error.violations()[0].description, "at most 1");
    EXPECT_EQ(error.retry_after(), std::chrono::milliseconds(1500));
  });
  EXPECT_EQ(looked, 1);
}

// Details that cannot be read leave the code and the message.
TEST(Errors, SurviveBrokenDetails) {
  EXPECT_EQ(ClassOf(grpc::Status(StatusCode::INTERNAL, "no", "\xff\xff")), typeid(InternalServerError));
}

template <typename Base, typename... Errors>
constexpr bool kAre = (std::is_base_of_v<Base, Errors> && ...);

// The tree that is the same in every language.
static_assert(kAre<LdaClientError, RequestRejected, Unavailable, Exhausted, DeadlineExceeded, Aborted,
                   InternalServerError, StreamBroken>);
static_assert(kAre<RequestRejected, ValidationFailed, ContextExceeded, PromptUnusable, NoChatTemplate, LimitExceeded,
                   TokenizersIncompatible, UnknownGeneration, AccessDenied>);
static_assert(kAre<AccessDenied, Unauthenticated, PermissionDenied>);
static_assert(kAre<Unavailable, Loading, Draining, WorkerDied, ServerAway>);
static_assert(kAre<Exhausted, QueueFull, CallerLimit, SlowConsumer, OutOfMemory>);
static_assert(kAre<DeadlineExceeded, DeadlineTooShort>);
static_assert(kAre<std::runtime_error, LdaClientError>);

}  // namespace
}  // namespace lda::internal
