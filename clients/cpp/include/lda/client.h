// Client of the LDA service: two language models decoded in lock-step, tokens sampled from
// `after + alpha * (after - before)`. Requests and events are the messages of the contract, in namespace lda::v1.
#ifndef LDA_CLIENT_H_
#define LDA_CLIENT_H_

#include <chrono>
#include <memory>
#include <optional>
#include <string>

#include "lda/completion.h"
#include "lda/errors.h"
#include "lda/prompt.h"
#include "lda/stream.h"
#include "lda/v1/lda_service.pb.h"

namespace grpc {
class ChannelInterface;
}

namespace lda {

/// How long to wait, by phase; empty waits as long as it takes.
struct Timeouts {
  /// For a connection; empty does not wait for a server that refuses.
  std::optional<std::chrono::milliseconds> connect;
  /// For a whole stream, from the call to its last event.
  std::optional<std::chrono::milliseconds> total;
  /// For the short calls: `TokenizerCompat`, `ModelPair`.
  std::optional<std::chrono::milliseconds> lookup = std::chrono::seconds(30);
};

/// TLS. Every field is the text of a PEM file, not its path.
struct Tls {
  /// Authorities that may have signed the server's certificate; empty takes those of the system.
  std::string ca_pem;
  /// Certificate of this client and its key, for mutual TLS; set both or neither.
  std::string certificate_pem;
  std::string key_pem;
  /// Name to expect in the server's certificate, where it is not the host of the target.
  std::string server_name;
};

/// How to reach the server.
struct Options {
  /// Bearer token, sent with every call. Without TLS it crosses the network readable.
  std::string token;
  /// Empty speaks plain text.
  std::optional<Tls> tls;
  Timeouts timeouts;
};

/// What holds for one call.
struct CallOptions {
  /// Deadline of this call; empty takes that of `Timeouts`.
  std::optional<std::chrono::milliseconds> timeout;
};

/// Client of one LDA server. Threads may share it; streams may outlive it.
///
/// Every verb throws an `LdaClientError` if its call fails; those that stream do so from reading.
class Client {
 public:
  /// `target` is `host:port` or any gRPC target. Throws std::invalid_argument for options that cannot be used.
  explicit Client(const std::string& target = "127.0.0.1:50051", Options options = {});
  Client(Client&&) noexcept;
  Client& operator=(Client&&) noexcept;
  ~Client();

  /// Streams text sampled from `after + alpha * (after - before)`.
  GenerateStream Generate(const v1::GenerateLDARequest& request, const CallOptions& call = {}) const;

  /// Streams text sampled from each model on its own; `role` tells them apart.
  GenerateBothStream GenerateBoth(const v1::GenerateBothRequest& request, const CallOptions& call = {}) const;

  /// Teacher-forces a continuation through both models, block by block.
  ScoreStream Score(const v1::ScoreRequest& request, const CallOptions& call = {}) const;

  /// Generates and returns the finished sequences.
  Completions Complete(const v1::GenerateLDARequest& request, const CallOptions& call = {}) const;

  /// Whether the two tokenizers can be used as one pair, with the evidence.
  v1::TokenizerCompatResponse TokenizerCompat(const CallOptions& call = {}) const;

  /// The loaded pair, the limits in force and the defaults of the server.
  v1::GetModelPairResponse ModelPair(const CallOptions& call = {}) const;

  /// The channel, for methods of the server that have no verb here; the bearer token is not sent by itself there.
  std::shared_ptr<grpc::ChannelInterface> channel() const;

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace lda

#endif  // LDA_CLIENT_H_
