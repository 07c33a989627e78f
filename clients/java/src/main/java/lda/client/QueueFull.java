package lda.client;

/** As many requests wait as may wait. Metadata: {@code depth}, {@code capacity}. */
public final class QueueFull extends Exhausted {
  private static final long serialVersionUID = 1;

  QueueFull(ErrorFacts facts) {
    super(facts);
  }
}
