// Draws two completions.
#include <iostream>
#include <string>

#include "lda/client.h"
#include "sample.h"

int main() {
  const std::string target = Target();
  // section:complete
  const lda::Client client(target);
  lda::v1::GenerateLDARequest request;
  *request.mutable_prompt() = lda::Chat({{"user", "What is the Japanese word for moon?"}});
  request.set_alpha(0.5);
  request.set_num_sequences(2);

  const lda::Completions completions = client.Complete(request);
  for (const lda::Completion& each : completions.sequences) {
    std::cout << each.finished.sequence_index() << ": " << each.text << "\n";
  }
  // endsection:complete

  Require(completions.sequences.size() == 2, "two sequences ended");
  for (const lda::Completion& each : completions.sequences) {
    Require(each.finished.reason() != lda::v1::FINISH_REASON_UNSPECIFIED, "a sequence says why it ended");
    Require(!each.text.empty(), "a sequence has text");
  }
  std::cout << "ok" << std::endl;
}
