package lda.client;

/** A field breaks a rule of the contract; {@link #violations()} holds its path and the rule. */
public final class ValidationFailed extends RequestRejected {
  private static final long serialVersionUID = 1;

  ValidationFailed(ErrorFacts facts) {
    super(facts);
  }
}
