package lda.client;

/**
 * Prompt and output do not fit the context window. Metadata: {@code prompt_tokens}, {@code max_new_tokens},
 * {@code limit}.
 */
public final class ContextExceeded extends RequestRejected {
  private static final long serialVersionUID = 1;

  ContextExceeded(ErrorFacts facts) {
    super(facts);
  }
}
