#include "lda/errors.h"

#include <utility>

#include "google/rpc/code.pb.h"

namespace lda {

LdaClientError::LdaClientError(const std::string& message, ErrorFacts facts)
    : std::runtime_error(message), facts_(std::make_shared<const ErrorFacts>(std::move(facts))) {}

std::string CodeName(grpc::StatusCode code) {
  const std::string& name = google::rpc::Code_Name(static_cast<google::rpc::Code>(code));
  return name.empty() ? std::to_string(code) : name;
}

}  // namespace lda
