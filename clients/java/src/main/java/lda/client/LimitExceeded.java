package lda.client;

/** A value is legal but above a limit of this server. Metadata: {@code field}, {@code limit}. */
public final class LimitExceeded extends RequestRejected {
  private static final long serialVersionUID = 1;

  LimitExceeded(ErrorFacts facts) {
    super(facts);
  }
}
