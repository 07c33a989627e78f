// Amplifies one prompt at several alphas with the same seed.
#include <iostream>
#include <string>
#include <vector>

#include "lda/client.h"
#include "sample.h"

namespace {

// section:kl
// How far apart the two models are along a sequence, in nats per token.
double MeanKl(const std::vector<lda::v1::Token>& tokens) {
  double sum = 0;
  for (const lda::v1::Token& token : tokens) sum += token.diagnostics().after_before_kl();
  return tokens.empty() ? 0 : sum / tokens.size();
}
// endsection:kl

// What the after model says by itself.
std::string AfterText(const lda::Client& client, const lda::v1::Prompt& prompt) {
  std::string after_text;
  // section:both
  lda::v1::GenerateBothRequest request;
  *request.mutable_prompt() = prompt;
  request.mutable_sampling()->set_seed(7);
  request.mutable_sampling()->set_temperature(0);

  const lda::Completions both = client.GenerateBoth(request).Gather();
  for (const lda::Completion& each : both.sequences) {
    std::cout << lda::v1::ModelRole_Name(each.finished.role()) << ": " << each.text << "\n";
    if (each.finished.role() == lda::v1::MODEL_ROLE_AFTER) after_text = each.text;
  }
  // endsection:both
  return after_text;
}

}  // namespace

int main() {
  const lda::Client client(Target());
  const lda::v1::Prompt prompt = lda::Chat({{"user", "What is the Japanese word for moon?"}});
  std::vector<std::string> texts;
  // section:sweep
  lda::v1::GenerateLDARequest request;
  *request.mutable_prompt() = prompt;
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

  Require(texts.at(0) == AfterText(client, prompt), "alpha 0 is the after model");
  std::cout << "ok" << std::endl;
}
