#include "src/channel.h"

#include <grpcpp/create_channel.h>
#include <grpcpp/security/credentials.h>
#include <grpcpp/support/channel_arguments.h>

#include <algorithm>
#include <stdexcept>

namespace lda::internal {
namespace {

constexpr int kMessageBytesMax = 20 << 20;

// Only UNAVAILABLE: the server sends it before any work was done. gRPC itself never retries once a stream has begun.
// Of several addresses behind one name, each call goes to the next.
constexpr char kServiceConfig[] = R"({
  "loadBalancingConfig": [{"round_robin": {}}],
  "methodConfig": [{
    "name": [{"service": "lda.v1.LdaService"}],
    "retryPolicy": {
      "maxAttempts": 4,
      "initialBackoff": "0.1s",
      "maxBackoff": "1s",
      "backoffMultiplier": 2,
      "retryableStatusCodes": ["UNAVAILABLE"]
    }
  }]
})";

grpc::ChannelArguments Arguments(const Options& options) {
  grpc::ChannelArguments arguments;
  arguments.SetUserAgentPrefix("lda-client-cpp/" LDA_CLIENT_VERSION);
  arguments.SetServiceConfigJSON(kServiceConfig);
  arguments.SetInt(GRPC_ARG_ENABLE_RETRIES, 1);
  arguments.SetInt(GRPC_ARG_PER_RPC_RETRY_BUFFER_SIZE, kMessageBytesMax);
  // Pings while a call is open, so that a dead peer is noticed during a long silent prefill.
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, 30'000);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 10'000);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 0);
  arguments.SetInt(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  arguments.SetMaxReceiveMessageSize(kMessageBytesMax);
  arguments.SetMaxSendMessageSize(kMessageBytesMax);
  if (options.tls && !options.tls->server_name.empty()) {
    arguments.SetSslTargetNameOverride(options.tls->server_name);
  }
  return arguments;
}

void CheckPem(const std::string& name, const std::string& pem) {
  if (pem.empty() || pem.find("-----BEGIN") != std::string::npos) return;
  throw std::invalid_argument("Tls." + name + " is not PEM; give the text of the file, not its path.");
}

std::shared_ptr<grpc::ChannelCredentials> Credentials(const Options& options) {
  if (!options.tls) return grpc::InsecureChannelCredentials();
  const Tls& tls = *options.tls;
  CheckPem("ca_pem", tls.ca_pem);
  CheckPem("certificate_pem", tls.certificate_pem);
  CheckPem("key_pem", tls.key_pem);
  if (tls.certificate_pem.empty() != tls.key_pem.empty()) {
    throw std::invalid_argument("Tls.certificate_pem and Tls.key_pem belong together; set both or neither.");
  }
  return grpc::SslCredentials({tls.ca_pem, tls.key_pem, tls.certificate_pem});
}

// gRPC ends the process over a header that cannot be sent.
void CheckToken(const std::string& token) {
  const auto printable = [](char c) { return c > ' ' && c <= '~'; };
  if (std::all_of(token.begin(), token.end(), printable)) return;
  throw std::invalid_argument("Options.token holds spaces or characters outside ASCII; give the bare token.");
}

}  // namespace

std::shared_ptr<grpc::Channel> OpenChannel(const std::string& target, const Options& options) {
  CheckToken(options.token);
  return grpc::CreateCustomChannel(target, Credentials(options), Arguments(options));
}

}  // namespace lda::internal
