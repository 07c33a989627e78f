package lda.client;

/** The prompt renders to no tokens, or holds ids outside the shared vocabulary. Metadata: {@code token_id}. */
public final class PromptUnusable extends RequestRejected {
  private static final long serialVersionUID = 1;

  PromptUnusable(ErrorFacts facts) {
    super(facts);
  }
}
