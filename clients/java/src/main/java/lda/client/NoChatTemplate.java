package lda.client;

/** A conversation was sent to a pair without a chat template; send text or token ids. */
public final class NoChatTemplate extends RequestRejected {
  private static final long serialVersionUID = 1;

  NoChatTemplate(ErrorFacts facts) {
    super(facts);
  }
}
