#include "lda/prompt.h"

#include <utility>

namespace lda {

v1::Prompt Text(std::string text) {
  v1::Prompt prompt;
  prompt.set_text(std::move(text));
  return prompt;
}

v1::Prompt Chat(const std::vector<Turn>& turns, bool continue_final_message) {
  v1::Prompt prompt;
  v1::Chat* chat = prompt.mutable_chat();
  chat->set_continue_final_message(continue_final_message);
  for (const Turn& turn : turns) {
    v1::ChatMessage* message = chat->add_messages();
    message->set_role(turn.role);
    message->set_content(turn.content);
  }
  return prompt;
}

v1::Prompt Tokens(const std::vector<uint32_t>& ids) {
  v1::Prompt prompt;
  prompt.mutable_tokens()->mutable_ids()->Add(ids.begin(), ids.end());
  return prompt;
}

}  // namespace lda
