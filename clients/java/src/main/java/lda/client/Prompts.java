package lda.client;

import java.util.Arrays;
import java.util.List;
import lda.v1.Chat;
import lda.v1.ChatMessage;
import lda.v1.Prompt;
import lda.v1.TokenIds;

/** The three forms of a prompt. */
public final class Prompts {
  private Prompts() {}

  /** Plain text, without the chat template. */
  public static Prompt text(String text) {
    return Prompt.newBuilder().setText(text).build();
  }

  /** A conversation, oldest turn first; the chat template of the pair renders it. */
  public static Prompt chat(ChatMessage... turns) {
    return Prompt.newBuilder().setChat(Chat.newBuilder().addAllMessages(List.of(turns))).build();
  }

  /** One turn of a conversation, such as {@code turn("user", "Who are you?")}. */
  public static ChatMessage turn(String role, String content) {
    return ChatMessage.newBuilder().setRole(role).setContent(content).build();
  }

  /** Token ids, used as they are. */
  public static Prompt tokens(int... ids) {
    return Prompt.newBuilder().setTokens(TokenIds.newBuilder().addAllIds(Arrays.stream(ids).boxed().toList())).build();
  }
}
