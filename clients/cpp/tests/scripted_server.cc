#include "tests/scripted_server.h"

#include <grpcpp/security/server_credentials.h>
#include <grpcpp/server_builder.h>

#include <chrono>
#include <thread>

#include "google/rpc/error_details.pb.h"

namespace lda::testing {

using std::chrono::milliseconds;

grpc::Status RichStatus(grpc::StatusCode code, const std::string& message,
                        const std::vector<const google::protobuf::Message*>& details) {
  google::rpc::Status status;
  status.set_code(code);
  status.set_message(message);
  for (const auto* detail : details) status.add_details()->PackFrom(*detail);
  return {code, message, status.SerializeAsString()};
}

grpc::Status ReasonStatus(grpc::StatusCode code, const std::string& reason, const std::string& domain) {
  google::rpc::ErrorInfo info;
  info.set_domain(domain);
  info.set_reason(reason);
  return RichStatus(code, "said by the server", {&info});
}

v1::GenerateLDAResponse StartedEvent(uint32_t sequence_count) {
  v1::GenerateLDAResponse event;
  event.mutable_started()->set_sequence_count(sequence_count);
  event.mutable_started()->set_seed(7);
  return event;
}

v1::GenerateLDAResponse DeltaEvent(const std::string& text, uint32_t index) {
  v1::GenerateLDAResponse event;
  event.mutable_delta()->set_sequence_index(index);
  event.mutable_delta()->set_text(text);
  event.mutable_delta()->add_tokens()->set_piece(text);
  return event;
}

v1::GenerateLDAResponse FinishedEvent(uint32_t index) {
  v1::GenerateLDAResponse event;
  event.mutable_finished()->set_sequence_index(index);
  event.mutable_finished()->set_reason(v1::FINISH_REASON_EOS);
  return event;
}

v1::GenerateLDAResponse UnknownEvent() {
  v1::GenerateLDAResponse event;
  event.ParseFromString("\xfa\x01\x02hi");  // field 31, of two bytes
  return event;
}

ScriptedServer::ScriptedServer() {
  int port = 0;
  grpc::ServerBuilder builder;
  builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
  builder.RegisterService(this);
  server_ = builder.BuildAndStart();
  target_ = "127.0.0.1:" + std::to_string(port);
}

ScriptedServer::~ScriptedServer() { server_->Shutdown(std::chrono::system_clock::now()); }

int ScriptedServer::calls() const {
  const std::lock_guard lock(mutex_);
  return calls_;
}

std::string ScriptedServer::Metadata(const std::string& key) const {
  const std::lock_guard lock(mutex_);
  const auto found = metadata_.find(key);
  return found == metadata_.end() ? "" : found->second;
}

bool ScriptedServer::WaitCancelled(int count) {
  std::unique_lock lock(mutex_);
  return changed_.wait_for(lock, std::chrono::seconds(10), [&] { return cancelled_ >= count; });
}

bool ScriptedServer::Refuse(const grpc::ServerContext& context) {
  const std::lock_guard lock(mutex_);
  metadata_.clear();
  for (const auto& [key, value] : context.client_metadata()) {
    metadata_.emplace(std::string(key.data(), key.size()), std::string(value.data(), value.size()));
  }
  return calls_++ < refusals;
}

grpc::Status ScriptedServer::End(grpc::ServerContext* context) {
  // A synchronous service has no event for a cancelled call.
  while (hold && !context->IsCancelled()) std::this_thread::sleep_for(milliseconds(1));
  if (context->IsCancelled()) {
    const std::lock_guard lock(mutex_);
    ++cancelled_;
    changed_.notify_all();
  }
  return status;
}

template <typename Event, typename Script>
grpc::Status ScriptedServer::Play(grpc::ServerContext* context, grpc::ServerWriter<Event>* writer,
                                  const std::vector<Script>& script) {
  if (Refuse(*context)) return ReasonStatus(grpc::StatusCode::UNAVAILABLE, "LOADING");
  for (const Script& each : script) {
    Event event;  // the events of both kinds of generation have the same fields
    event.ParseFromString(each.SerializeAsString());
    writer->Write(event);
  }
  return End(context);
}

grpc::Status ScriptedServer::GenerateLDA(grpc::ServerContext* context, const v1::GenerateLDARequest*,
                                         grpc::ServerWriter<v1::GenerateLDAResponse>* writer) {
  return Play(context, writer, events);
}

grpc::Status ScriptedServer::GenerateBoth(grpc::ServerContext* context, const v1::GenerateBothRequest*,
                                          grpc::ServerWriter<v1::GenerateBothResponse>* writer) {
  return Play(context, writer, events);
}

grpc::Status ScriptedServer::Score(grpc::ServerContext* context, const v1::ScoreRequest*,
                                   grpc::ServerWriter<v1::ScoreResponse>* writer) {
  return Play(context, writer, blocks);
}

grpc::Status ScriptedServer::TokenizerCompat(grpc::ServerContext* context, const v1::TokenizerCompatRequest*,
                                             v1::TokenizerCompatResponse* response) {
  if (Refuse(*context)) return ReasonStatus(grpc::StatusCode::UNAVAILABLE, "LOADING");
  response->set_compatible(true);
  return End(context);
}

grpc::Status ScriptedServer::GetModelPair(grpc::ServerContext* context, const v1::GetModelPairRequest*,
                                          v1::GetModelPairResponse* response) {
  if (Refuse(*context)) return ReasonStatus(grpc::StatusCode::UNAVAILABLE, "LOADING");
  response->set_device("cpu");
  return End(context);
}

}  // namespace lda::testing
