// From a gRPC status to the error that it stands for.
#ifndef LDA_SRC_STATUS_H_
#define LDA_SRC_STATUS_H_

#include <grpcpp/support/status.h>

#include <chrono>
#include <string>

namespace lda::internal {

/// Throws the error of a call that did not end with OK.
///
/// `answered` tells whether the server had begun to answer, so that the connection was lost and not refused.
[[noreturn]] void ThrowError(const grpc::Status& status, const std::string& target, bool answered);

/// Throws the error for a connection that did not come up in time.
[[noreturn]] void ThrowNotConnected(const std::string& target, std::chrono::milliseconds waited);

}  // namespace lda::internal

#endif  // LDA_SRC_STATUS_H_
