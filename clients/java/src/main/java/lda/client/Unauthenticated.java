package lda.client;

/** The call carries no token, or one that is unknown or expired. */
public final class Unauthenticated extends AccessDenied {
  private static final long serialVersionUID = 1;

  Unauthenticated(ErrorFacts facts) {
    super(facts);
  }
}
