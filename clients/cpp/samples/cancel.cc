// Leaves a long generation after three tokens, and sees the server free it.
#include <grpcpp/client_context.h>

#include <chrono>
#include <iostream>
#include <thread>

#include "lda/client.h"
#include "lda/v1/lda_service.grpc.pb.h"
#include "sample.h"

namespace {

using Clock = std::chrono::steady_clock;

// No verb: it is a method for balancers and operators.
uint32_t OpenRequests(const lda::Client& client) {
  const auto stub = lda::v1::LdaService::NewStub(client.channel());
  grpc::ClientContext context;
  lda::v1::GetLoadResponse load;
  Require(stub->GetLoad(&context, {}, &load).ok(), "the server tells its load");
  return load.open_requests();
}

bool BecomesIdle(const lda::Client& client) {
  const auto deadline = Clock::now() + std::chrono::seconds(10);
  while (OpenRequests(client) > 0) {
    if (Clock::now() > deadline) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  }
  return true;
}

}  // namespace

int main() {
  const lda::Client client(Target());
  lda::v1::GenerateLDARequest request;
  *request.mutable_prompt() = lda::Chat({{"user", "What is the Japanese word for moon?"}});
  request.mutable_stopping()->set_max_new_tokens(400);
  request.mutable_stopping()->set_ignore_eos(true);

  int tokens = 0, finished = 0;
  // section:cancel
  {
    lda::GenerateStream stream = client.Generate(request);
    for (const auto& event : stream) {
      finished += event.has_finished();
      tokens += event.delta().tokens_size();
      if (tokens >= 3) break;
    }
  }  // the stream is destroyed, and the call cancelled
  // endsection:cancel

  Require(tokens >= 3 && finished == 0, "it was left before its end");
  Require(BecomesIdle(client), "the server freed it");

  lda::GenerateStream stream = client.Generate(request);
  stream.Cancel();
  Require(!stream.Next(), "a cancelled stream ends without an error");
  std::cout << "ok" << std::endl;
}
