package lda.client;

/** A fault of the server; its log holds more under the same id. Metadata: {@code request_id}. */
public final class InternalServerError extends LdaClientError {
  private static final long serialVersionUID = 1;

  InternalServerError(ErrorFacts facts) {
    super(facts);
  }
}
