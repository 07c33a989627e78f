// How a channel to the service is set up: credentials, retries, keepalive, message limits.
#ifndef LDA_SRC_CHANNEL_H_
#define LDA_SRC_CHANNEL_H_

#include <grpcpp/channel.h>

#include <memory>
#include <string>

#include "lda/client.h"

namespace lda::internal {

/// Opens a channel. Throws std::invalid_argument for options that cannot be used.
std::shared_ptr<grpc::Channel> OpenChannel(const std::string& target, const Options& options);

}  // namespace lda::internal

#endif  // LDA_SRC_CHANNEL_H_
