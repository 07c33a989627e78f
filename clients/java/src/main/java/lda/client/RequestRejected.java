package lda.client;

/** The request cannot be served as it stands; change it before trying again. */
public class RequestRejected extends LdaClientError {
  private static final long serialVersionUID = 1;

  RequestRejected(ErrorFacts facts) {
    super(facts);
  }
}
