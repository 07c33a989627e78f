#include "lda/client.h"

#include <grpcpp/client_context.h>

#include <utility>

#include "lda/v1/lda_service.grpc.pb.h"
#include "src/call.h"
#include "src/channel.h"
#include "src/status.h"

namespace lda {

using v1::LdaService;
using Milliseconds = std::optional<std::chrono::milliseconds>;

class Client::Impl {
 public:
  Impl(const std::string& target, Options options)
      : target_(target),
        options_(std::move(options)),
        channel_(internal::OpenChannel(target, options_)),
        stub_(LdaService::NewStub(channel_)) {}

  const std::shared_ptr<grpc::Channel>& channel() const { return channel_; }

  /// Begins a streaming call.
  template <typename Request, typename Event>
  std::unique_ptr<internal::Call<Event>> Open(
      std::unique_ptr<grpc::ClientReader<Event>> (LdaService::Stub::*method)(grpc::ClientContext*, const Request&),
      const Request& request, const CallOptions& call) const {
    auto context = std::make_unique<grpc::ClientContext>();
    Prepare(context.get(), call.timeout ? call.timeout : options_.timeouts.total);
    auto events = (stub_.get()->*method)(context.get(), request);
    return std::make_unique<internal::Call<Event>>(std::move(context), std::move(events), target_);
  }

  /// Makes a short call.
  template <typename Request, typename Response>
  Response Ask(grpc::Status (LdaService::Stub::*method)(grpc::ClientContext*, const Request&, Response*),
               const CallOptions& call) const {
    grpc::ClientContext context;
    Prepare(&context, call.timeout ? call.timeout : options_.timeouts.lookup);
    Response response;
    const grpc::Status status = (stub_.get()->*method)(&context, Request(), &response);
    if (!status.ok()) internal::ThrowError(status, target_, false);
    return response;
  }

 private:
  void Prepare(grpc::ClientContext* context, const Milliseconds& timeout) const {
    Connect();
    if (timeout) context->set_deadline(std::chrono::system_clock::now() + *timeout);
    // Not as call credentials, which gRPC refuses to send over plain text.
    if (!options_.token.empty()) context->AddMetadata("authorization", "Bearer " + options_.token);
  }

  void Connect() const {
    const Milliseconds& wait = options_.timeouts.connect;
    if (!wait || channel_->WaitForConnected(std::chrono::system_clock::now() + *wait)) return;
    internal::ThrowNotConnected(target_, *wait);
  }

  std::string target_;
  Options options_;
  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<LdaService::Stub> stub_;
};

Client::Client(const std::string& target, Options options)
    : impl_(std::make_unique<Impl>(target, std::move(options))) {}
Client::Client(Client&&) noexcept = default;
Client& Client::operator=(Client&&) noexcept = default;
Client::~Client() = default;

GenerateStream Client::Generate(const v1::GenerateLDARequest& request, const CallOptions& call) const {
  return GenerateStream(impl_->Open(&LdaService::Stub::GenerateLDA, request, call));
}

GenerateBothStream Client::GenerateBoth(const v1::GenerateBothRequest& request, const CallOptions& call) const {
  return GenerateBothStream(impl_->Open(&LdaService::Stub::GenerateBoth, request, call));
}

ScoreStream Client::Score(const v1::ScoreRequest& request, const CallOptions& call) const {
  return ScoreStream(impl_->Open(&LdaService::Stub::Score, request, call));
}

Completions Client::Complete(const v1::GenerateLDARequest& request, const CallOptions& call) const {
  return Generate(request, call).Gather();
}

v1::TokenizerCompatResponse Client::TokenizerCompat(const CallOptions& call) const {
  return impl_->Ask(&LdaService::Stub::TokenizerCompat, call);
}

v1::GetModelPairResponse Client::ModelPair(const CallOptions& call) const {
  return impl_->Ask(&LdaService::Stub::GetModelPair, call);
}

std::shared_ptr<grpc::ChannelInterface> Client::channel() const { return impl_->channel(); }

}  // namespace lda
