// One streaming call under way.
#ifndef LDA_SRC_CALL_H_
#define LDA_SRC_CALL_H_

#include <grpcpp/client_context.h>

#include <atomic>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "lda/errors.h"
#include "lda/v1/lda_service.grpc.pb.h"
#include "src/reader.h"
#include "src/status.h"

namespace lda::internal {

template <typename Event>
class Call {
 public:
  using Reader = std::conditional_t<std::is_same_v<Event, v1::ScoreResponse>, ScoreReader, GenerateReader>;

  Call(std::unique_ptr<grpc::ClientContext> context, std::unique_ptr<grpc::ClientReader<Event>> events,
       std::string target)
      : context_(std::move(context)), events_(std::move(events)), target_(std::move(target)) {}

  ~Call() { Abandon(); }

  std::optional<Event> Next() {
    while (!ended_ && !cancelled_) {
      Event event;
      if (!events_->Read(&event)) {
        End();
      } else if (Observe(event)) {
        return event;
      }
    }
    return std::nullopt;
  }

  void Cancel() {
    cancelled_ = true;
    context_->TryCancel();
  }

  typename Reader::Whole Gather() {
    if (reader_.begun()) {
      throw std::logic_error("Gather() needs the whole stream, but tokens were already read from this one.");
    }
    while (std::optional<Event> event = Next()) reader_.Add(&*event);
    reader_.ObserveEnd();
    return reader_.Take();
  }

 private:
  bool Observe(const Event& event) {
    answered_ = true;
    try {
      return reader_.Observe(event);
    } catch (const StreamBroken&) {
      Abandon();
      throw;
    }
  }

  void End() {
    ended_ = true;
    const grpc::Status status = events_->Finish();
    if (cancelled_) return;
    if (!status.ok()) ThrowError(status, target_, answered_);
    reader_.ObserveEnd();
  }

  // gRPC asks for the status of every call, of one that nobody wants any more too.
  void Abandon() {
    if (std::exchange(ended_, true)) return;
    context_->TryCancel();
    events_->Finish();
  }

  // Before events_, which uses it to its end.
  std::unique_ptr<grpc::ClientContext> context_;
  std::unique_ptr<grpc::ClientReader<Event>> events_;
  std::string target_;
  Reader reader_;
  bool answered_ = false;
  bool ended_ = false;
  std::atomic<bool> cancelled_ = false;
};

}  // namespace lda::internal

#endif  // LDA_SRC_CALL_H_
