package lda.client;

/** An operator, a shutdown or an interrupt of the reading thread ended the call. */
public final class Aborted extends LdaClientError {
  private static final long serialVersionUID = 1;

  Aborted(ErrorFacts facts) {
    super(facts);
  }
}
