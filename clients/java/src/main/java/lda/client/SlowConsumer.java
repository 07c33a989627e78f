package lda.client;

/** The stream was read too slowly and the server ended it. Metadata: {@code buffered_tokens}. */
public final class SlowConsumer extends Exhausted {
  private static final long serialVersionUID = 1;

  SlowConsumer(ErrorFacts facts) {
    super(facts);
  }
}
