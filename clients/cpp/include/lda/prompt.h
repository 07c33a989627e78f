// The three forms of a prompt.
#ifndef LDA_PROMPT_H_
#define LDA_PROMPT_H_

#include <cstdint>
#include <string>
#include <vector>

#include "lda/v1/lda_service.pb.h"

namespace lda {

/// One turn of a conversation; `role` as the chat template names it: `system`, `user`, `assistant`.
struct Turn {
  std::string role;
  std::string content;
};

/// Plain text, without a template.
v1::Prompt Text(std::string text);

/// A conversation, which the pair's chat template renders. `continue_final_message` continues the last turn instead of
/// opening a new one.
v1::Prompt Chat(const std::vector<Turn>& turns, bool continue_final_message = false);

/// Token ids, used as they are.
v1::Prompt Tokens(const std::vector<uint32_t>& ids);

}  // namespace lda

#endif  // LDA_PROMPT_H_
