// Every error that a call can end with.
//
//   LdaClientError
//   ├── RequestRejected         the request cannot be served as it stands; change it
//   │   ├── ValidationFailed        a field breaks a rule of the contract; violations() names it
//   │   ├── ContextExceeded         prompt and output do not fit the context window
//   │   ├── PromptUnusable          the prompt renders to nothing, or holds ids outside the shared vocabulary
//   │   ├── NoChatTemplate          a conversation was sent to a pair without a chat template
//   │   ├── LimitExceeded           legal, but above a limit of this server
//   │   ├── TokenizersIncompatible  the two vocabularies do not match
//   │   ├── UnknownGeneration       no generation of this id is open
//   │   └── AccessDenied            the server does not know this caller, or does not let it do this
//   │       ├── Unauthenticated         no token, an unknown or an expired one
//   │       └── PermissionDenied        the token or certificate does not allow this method
//   ├── Unavailable             nothing is wrong with the request; try again later or elsewhere
//   │   ├── Loading                 the models are still being loaded or warmed up
//   │   ├── Draining                the server is shutting down
//   │   ├── WorkerDied              the process that owns the models died
//   │   └── ServerAway              nobody answers at the target, or the connection was lost
//   ├── Exhausted               something ran out
//   │   ├── QueueFull               as many requests wait as may wait
//   │   ├── CallerLimit             this caller has as many requests open as it may
//   │   ├── SlowConsumer            the stream was read too slowly
//   │   └── OutOfMemory             device memory ran out while serving the request
//   ├── DeadlineExceeded        the deadline of the call went by
//   │   └── DeadlineTooShort        refused at once: the wait would have been longer
//   ├── Aborted                 an operator or a shutdown ended the call
//   ├── InternalServerError     a fault of the server
//   └── StreamBroken            the stream ended or went on against the contract
//
// A bad argument that never leaves this process is a std::invalid_argument.
#ifndef LDA_ERRORS_H_
#define LDA_ERRORS_H_

#include <grpcpp/support/status_code_enum.h>

#include <chrono>
#include <map>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

namespace lda {

/// One field that breaks a rule: its path, such as `sampling.top_p`, and the rule in words.
struct Violation {
  std::string field;
  std::string description;
};

/// What a status says besides its message.
struct ErrorFacts {
  std::optional<grpc::StatusCode> code;
  std::optional<std::string> reason;
  std::map<std::string, std::string> metadata;
  std::vector<Violation> violations;
  std::optional<std::chrono::nanoseconds> retry_after;
};

/// Base of all errors of this client. `what()` is the message, in words of the server where it spoke.
class LdaClientError : public std::runtime_error {
 public:
  explicit LdaClientError(const std::string& message, ErrorFacts facts = {});

  /// The gRPC status code; empty where no status was received.
  std::optional<grpc::StatusCode> code() const { return facts_->code; }
  /// Name of the `ErrorReason` without its prefix, such as `QUEUE_FULL`; empty where none was given.
  const std::optional<std::string>& reason() const { return facts_->reason; }
  /// The facts that the contract documents for the reason, as text.
  const std::map<std::string, std::string>& metadata() const { return facts_->metadata; }
  /// Fields at fault, for `ValidationFailed`; else empty.
  const std::vector<Violation>& violations() const { return facts_->violations; }
  /// Time after which the server suggests to try again; empty where it does not.
  std::optional<std::chrono::nanoseconds> retry_after() const { return facts_->retry_after; }

 private:
  // Shared, so that copying an exception cannot throw.
  std::shared_ptr<const ErrorFacts> facts_;
};

/// The request cannot be served as it stands; change it before trying again.
struct RequestRejected : LdaClientError {
  using LdaClientError::LdaClientError;
};
/// A field breaks a rule of the contract; `violations()` holds its path and the rule.
struct ValidationFailed : RequestRejected {
  using RequestRejected::RequestRejected;
};
/// Prompt and output do not fit the context window. Metadata: `prompt_tokens`, `max_new_tokens`, `limit`.
struct ContextExceeded : RequestRejected {
  using RequestRejected::RequestRejected;
};
/// The prompt renders to no tokens, or holds ids outside the shared vocabulary. Metadata: `token_id`.
struct PromptUnusable : RequestRejected {
  using RequestRejected::RequestRejected;
};
/// A conversation was sent to a pair without a chat template; send text or token ids.
struct NoChatTemplate : RequestRejected {
  using RequestRejected::RequestRejected;
};
/// A value is legal but above a limit of this server. Metadata: `field`, `limit`.
struct LimitExceeded : RequestRejected {
  using RequestRejected::RequestRejected;
};
/// The two vocabularies do not match; `Client::TokenizerCompat` says where.
struct TokenizersIncompatible : RequestRejected {
  using RequestRejected::RequestRejected;
};
/// No generation of this id is open on this server. Metadata: `generation_id`.
struct UnknownGeneration : RequestRejected {
  using RequestRejected::RequestRejected;
};
/// The bearer token or client certificate is missing, wrong, or without the right to this call.
struct AccessDenied : RequestRejected {
  using RequestRejected::RequestRejected;
};
/// The call carries no token, or one that is unknown or expired.
struct Unauthenticated : AccessDenied {
  using AccessDenied::AccessDenied;
};
/// The token or certificate does not allow this method. Metadata: `scope`, where one is missing.
struct PermissionDenied : AccessDenied {
  using AccessDenied::AccessDenied;
};

/// Nothing is wrong with the request; try again later or at another server.
struct Unavailable : LdaClientError {
  using LdaClientError::LdaClientError;
};
/// The models are still being loaded or warmed up.
struct Loading : Unavailable {
  using Unavailable::Unavailable;
};
/// The server is shutting down and takes no new work.
struct Draining : Unavailable {
  using Unavailable::Unavailable;
};
/// The process that owns the models died; a fresh one is being started.
struct WorkerDied : Unavailable {
  using Unavailable::Unavailable;
};
/// Nobody answers at the target, or the connection to it was lost.
struct ServerAway : Unavailable {
  using Unavailable::Unavailable;
};

/// Something ran out: room in the queue, patience with a slow reader, or memory.
struct Exhausted : LdaClientError {
  using LdaClientError::LdaClientError;
};
/// As many requests wait as may wait. Metadata: `depth`, `capacity`.
struct QueueFull : Exhausted {
  using Exhausted::Exhausted;
};
/// This caller has as many requests open as one caller may. Metadata: `open`, `limit`.
struct CallerLimit : Exhausted {
  using Exhausted::Exhausted;
};
/// The stream was read too slowly and the server ended it. Metadata: `buffered_tokens`.
struct SlowConsumer : Exhausted {
  using Exhausted::Exhausted;
};
/// Device memory ran out while serving this request.
struct OutOfMemory : Exhausted {
  using Exhausted::Exhausted;
};

/// The deadline of the call went by. `Stopping.time_budget` ends early without an error.
struct DeadlineExceeded : LdaClientError {
  using LdaClientError::LdaClientError;
};
/// Refused at once: the expected wait is longer than the deadline. Metadata: `expected_wait_ms`, `remaining_ms`.
struct DeadlineTooShort : DeadlineExceeded {
  using DeadlineExceeded::DeadlineExceeded;
};

/// An operator or a shutdown ended the call.
struct Aborted : LdaClientError {
  using LdaClientError::LdaClientError;
};
/// A fault of the server; its log holds more under the same id. Metadata: `request_id`.
struct InternalServerError : LdaClientError {
  using LdaClientError::LdaClientError;
};
/// The stream ended or went on against the contract, such as an OK end before every sequence finished.
struct StreamBroken : LdaClientError {
  using LdaClientError::LdaClientError;
};

/// The name of a status code, such as `RESOURCE_EXHAUSTED`.
std::string CodeName(grpc::StatusCode code);

}  // namespace lda

#endif  // LDA_ERRORS_H_
