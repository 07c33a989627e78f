// A real server that plays a script for every call.
#ifndef LDA_TESTS_SCRIPTED_SERVER_H_
#define LDA_TESTS_SCRIPTED_SERVER_H_

#include <grpcpp/server.h>
#include <grpcpp/server_context.h>

#include <condition_variable>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "google/rpc/status.pb.h"
#include "lda/v1/lda_service.grpc.pb.h"

namespace lda::testing {

/// A status that carries details as the LDA server sends them.
grpc::Status RichStatus(grpc::StatusCode code, const std::string& message,
                        const std::vector<const google::protobuf::Message*>& details);

/// A status with an `ErrorInfo` alone.
grpc::Status ReasonStatus(grpc::StatusCode code, const std::string& reason, const std::string& domain = "lda.v1");

/// Events of a generation.
v1::GenerateLDAResponse StartedEvent(uint32_t sequence_count);
v1::GenerateLDAResponse DeltaEvent(const std::string& text, uint32_t index = 0);
v1::GenerateLDAResponse FinishedEvent(uint32_t index = 0);
/// An event of a kind that this contract does not know.
v1::GenerateLDAResponse UnknownEvent();

/// Plays the same script for every call, and remembers the calls.
class ScriptedServer : public v1::LdaService::Service {
 public:
  ScriptedServer();
  ~ScriptedServer() override;

  /// Where it listens.
  const std::string& target() const { return target_; }

  /// What a stream sends before it ends with `status`.
  std::vector<v1::GenerateLDAResponse> events;
  std::vector<v1::ScoreResponse> blocks;
  grpc::Status status;
  /// How many calls are refused with UNAVAILABLE before the script is played.
  int refusals = 0;
  /// Whether a stream stays open after its events until it is cancelled.
  bool hold = false;

  int calls() const;
  /// The metadata that a call of this key carried last.
  std::string Metadata(const std::string& key) const;
  /// Waits until the server has seen this many cancelled calls; false after ten seconds.
  bool WaitCancelled(int count);

  grpc::Status GenerateLDA(grpc::ServerContext* context, const v1::GenerateLDARequest* request,
                           grpc::ServerWriter<v1::GenerateLDAResponse>* writer) override;
  grpc::Status GenerateBoth(grpc::ServerContext* context, const v1::GenerateBothRequest* request,
                            grpc::ServerWriter<v1::GenerateBothResponse>* writer) override;
  grpc::Status Score(grpc::ServerContext* context, const v1::ScoreRequest* request,
                     grpc::ServerWriter<v1::ScoreResponse>* writer) override;
  grpc::Status TokenizerCompat(grpc::ServerContext* context, const v1::TokenizerCompatRequest* request,
                               v1::TokenizerCompatResponse* response) override;
  grpc::Status GetModelPair(grpc::ServerContext* context, const v1::GetModelPairRequest* request,
                            v1::GetModelPairResponse* response) override;

 private:
  template <typename Event, typename Script>
  grpc::Status Play(grpc::ServerContext* context, grpc::ServerWriter<Event>* writer, const std::vector<Script>& script);
  bool Refuse(const grpc::ServerContext& context);
  grpc::Status End(grpc::ServerContext* context);

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  int calls_ = 0;
  int cancelled_ = 0;
  std::map<std::string, std::string> metadata_;
  std::string target_;
  std::unique_ptr<grpc::Server> server_;
};

}  // namespace lda::testing

#endif  // LDA_TESTS_SCRIPTED_SERVER_H_
