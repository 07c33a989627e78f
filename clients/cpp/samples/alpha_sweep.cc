// Amplifies one prompt at several alphas with the same seed.
#include <iostream>
#include <string>
#include <vector>

#include "lda/client.h"
#include "sample.h"

namespace {

const lda::v1::Prompt& Question() {
  static const auto& prompt = *new lda::v1::Prompt(lda::Chat({{"user", "What is the Japanese word for moon?"}}));
  return prompt;
}

// section:kl
// How far apart the two models are along a sequence, in nats per token.
double MeanKl(const std::vector<lda::v1::Token>& tokens) {
  double sum = 0;
  for (const lda::v1::Token& token : tokens) sum += token.diagnostics().after_before_kl();
  return tokens.empty() ? 0 : sum / tokens.size();
}
// endsection:kl

// What the after model says by itself.
std::string AfterText(const lda::Client& client) {
  // section:both
  lda::v1::GenerateBothRequest request;
  *request.mutable_prompt() = Question();
  request.mutable_sampling()->set_seed(7);
  request.mutable_sampling()->set_temperature(0);
  for (const lda::Completion& each : client.GenerateBoth(request).Gather().sequences) {
    if (each.finished.role() == lda::v1::MODEL_ROLE_AFTER) return each.text;
  }
  // endsection:both
  return "";
}

}  // namespace

int main() {
  const lda::Client client(Target());
  std::vector<std::string> texts;
  // section:sweep
  lda::v1::GenerateLDARequest request;
  *request.mutable_prompt() = Question();
  request.mutable_sampling()->set_seed(7);
  request.mutable_sampling()->set_temperature(0);
  request.mutable_output()->set_diagnostics(true);
  for (const float alpha : {0.0f, 0.5f, 1.0f}) {
    request.set_alpha(alpha);
    const lda::Completion drawn = client.Complete(request).sequences.at(0);
    std::cout << "alpha " << alpha << ", mean KL " << MeanKl(drawn.tokens) << ": " << drawn.text << "\n";
    texts.push_back(drawn.text);
  }
  // endsection:sweep

  Require(texts.at(0) == AfterText(client), "alpha 0 is the after model");
  std::cout << "ok" << std::endl;
}
