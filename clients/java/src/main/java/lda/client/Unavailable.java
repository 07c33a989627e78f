package lda.client;

/** Nothing is wrong with the request; try again later or at another server. */
public class Unavailable extends LdaClientError {
  private static final long serialVersionUID = 1;

  Unavailable(ErrorFacts facts) {
    super(facts);
  }
}
