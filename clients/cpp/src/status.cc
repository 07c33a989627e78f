#include "src/status.h"

#include <exception>
#include <map>
#include <optional>
#include <string>
#include <utility>

#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"
#include "lda/errors.h"
#include "lda/v1/lda_service.pb.h"

namespace lda::internal {
namespace {

constexpr char kErrorDomain[] = "lda.v1";
constexpr char kReasonPrefix[] = "ERROR_REASON_";

using Maker = std::exception_ptr (*)(const std::string& message, ErrorFacts facts);

template <typename Error>
std::exception_ptr Make(const std::string& message, ErrorFacts facts) {
  return std::make_exception_ptr(Error(message, std::move(facts)));
}

const std::map<v1::ErrorReason, Maker>& MakersByReason() {
  static const auto& makers = *new std::map<v1::ErrorReason, Maker>{
      {v1::ERROR_REASON_VALIDATION_FAILED, Make<ValidationFailed>},
      {v1::ERROR_REASON_CONTEXT_EXCEEDED, Make<ContextExceeded>},
      {v1::ERROR_REASON_PROMPT_UNUSABLE, Make<PromptUnusable>},
      {v1::ERROR_REASON_NO_CHAT_TEMPLATE, Make<NoChatTemplate>},
      {v1::ERROR_REASON_TOKENIZERS_INCOMPATIBLE, Make<TokenizersIncompatible>},
      {v1::ERROR_REASON_LIMIT_EXCEEDED, Make<LimitExceeded>},
      {v1::ERROR_REASON_QUEUE_FULL, Make<QueueFull>},
      {v1::ERROR_REASON_SLOW_CONSUMER, Make<SlowConsumer>},
      {v1::ERROR_REASON_LOADING, Make<Loading>},
      {v1::ERROR_REASON_DRAINING, Make<Draining>},
      {v1::ERROR_REASON_WORKER_DIED, Make<WorkerDied>},
      {v1::ERROR_REASON_OUT_OF_MEMORY, Make<OutOfMemory>},
      {v1::ERROR_REASON_ABORTED, Make<Aborted>},
      {v1::ERROR_REASON_INTERNAL, Make<InternalServerError>},
      {v1::ERROR_REASON_DEADLINE_TOO_SHORT, Make<DeadlineTooShort>},
      {v1::ERROR_REASON_CALLER_LIMIT, Make<CallerLimit>},
      {v1::ERROR_REASON_UNAUTHENTICATED, Make<Unauthenticated>},
      {v1::ERROR_REASON_PERMISSION_DENIED, Make<PermissionDenied>},
      {v1::ERROR_REASON_UNKNOWN_GENERATION, Make<UnknownGeneration>},
  };
  return makers;
}

// For a status without a reason that we know: one made by gRPC itself, a proxy, or a newer server.
Maker MakerByCode(grpc::StatusCode code) {
  switch (code) {
    case grpc::StatusCode::INVALID_ARGUMENT:
    case grpc::StatusCode::FAILED_PRECONDITION:
    case grpc::StatusCode::OUT_OF_RANGE:
    case grpc::StatusCode::NOT_FOUND:
    case grpc::StatusCode::ALREADY_EXISTS:
    case grpc::StatusCode::UNIMPLEMENTED:
      return Make<RequestRejected>;
    case grpc::StatusCode::UNAUTHENTICATED:
    case grpc::StatusCode::PERMISSION_DENIED:
      return Make<AccessDenied>;
    case grpc::StatusCode::UNAVAILABLE:
      return Make<Unavailable>;
    case grpc::StatusCode::RESOURCE_EXHAUSTED:
      return Make<Exhausted>;
    case grpc::StatusCode::DEADLINE_EXCEEDED:
      return Make<DeadlineExceeded>;
    case grpc::StatusCode::ABORTED:
    case grpc::StatusCode::CANCELLED:
      return Make<Aborted>;
    case grpc::StatusCode::INTERNAL:
    case grpc::StatusCode::UNKNOWN:
    case grpc::StatusCode::DATA_LOSS:
      return Make<InternalServerError>;
    default:
      return Make<LdaClientError>;
  }
}

Maker MakerOf(const ErrorFacts& facts) {
  v1::ErrorReason reason = v1::ERROR_REASON_UNSPECIFIED;
  if (facts.reason) v1::ErrorReason_Parse(kReasonPrefix + *facts.reason, &reason);
  const auto found = MakersByReason().find(reason);
  return found == MakersByReason().end() ? MakerByCode(*facts.code) : found->second;
}

template <typename Detail>
std::optional<Detail> FindDetail(const google::rpc::Status& status) {
  Detail detail;
  for (const google::protobuf::Any& packed : status.details()) {
    if (packed.UnpackTo(&detail)) return detail;
  }
  return std::nullopt;
}

void ReadInfo(const google::rpc::ErrorInfo& info, ErrorFacts* facts) {
  if (info.domain() != kErrorDomain) return;
  if (!info.reason().empty()) facts->reason = info.reason();
  facts->metadata.insert(info.metadata().begin(), info.metadata().end());
}

std::chrono::nanoseconds ToNanoseconds(const google::protobuf::Duration& duration) {
  return std::chrono::seconds(duration.seconds()) + std::chrono::nanoseconds(duration.nanos());
}

ErrorFacts ReadFacts(const grpc::Status& status) {
  ErrorFacts facts;
  facts.code = status.error_code();
  google::rpc::Status details;
  if (!details.ParseFromString(status.error_details())) return facts;
  if (auto info = FindDetail<google::rpc::ErrorInfo>(details)) ReadInfo(*info, &facts);
  if (auto bad = FindDetail<google::rpc::BadRequest>(details)) {
    for (const auto& each : bad->field_violations()) facts.violations.push_back({each.field(), each.description()});
  }
  if (auto retry = FindDetail<google::rpc::RetryInfo>(details)) facts.retry_after = ToNanoseconds(retry->retry_delay());
  return facts;
}

std::string Away(const std::string& cause, const std::string& target, bool answered) {
  if (answered) return "The connection to " + target + " was lost before the answer was complete (" + cause + ").";
  return "No LDA server answers at " + target + " (" + cause +
         "): start it with `lda-service serve`, or give another target.";
}

}  // namespace

void ThrowError(const grpc::Status& status, const std::string& target, bool answered) {
  ErrorFacts facts = ReadFacts(status);
  const std::string message = status.error_message().empty() ? CodeName(*facts.code) : status.error_message();
  if (!facts.reason && facts.code == grpc::StatusCode::UNAVAILABLE) {
    throw ServerAway(Away(message, target, answered), std::move(facts));
  }
  const Maker make = MakerOf(facts);
  std::rethrow_exception(make(message, std::move(facts)));
}

void ThrowNotConnected(const std::string& target, std::chrono::milliseconds waited) {
  throw ServerAway(Away("no connection within " + std::to_string(waited.count()) + " ms", target, false));
}

}  // namespace lda::internal
