package lda.client;

/** The models are still being loaded or warmed up. */
public final class Loading extends Unavailable {
  private static final long serialVersionUID = 1;

  Loading(ErrorFacts facts) {
    super(facts);
  }
}
