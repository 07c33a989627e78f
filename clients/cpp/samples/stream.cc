// Prints the text as it arrives.
#include <iostream>
#include <string>

#include "lda/client.h"
#include "sample.h"

int main() {
  const lda::Client client(Target());
  lda::v1::GenerateLDARequest request;
  *request.mutable_prompt() = lda::Chat({{"user", "What is the Japanese word for moon?"}});
  request.mutable_sampling()->set_seed(7);

  // section:stream
  std::string text;
  for (const auto& event : client.Generate(request)) {
    std::cout << event.delta().text() << std::flush;  // empty for an event that is no delta
    text += event.delta().text();
  }
  // endsection:stream
  std::cout << "\n";

  Require(!text.empty(), "text arrived");
  Require(text == client.Complete(request).sequences.at(0).text, "the pieces add up to the completion of this seed");
  std::cout << "ok" << std::endl;
}
