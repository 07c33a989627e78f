package lda.client;

/** The timeout of the call went by. {@code Stopping.time_budget} ends early without an error. */
public class DeadlineExceeded extends LdaClientError {
  private static final long serialVersionUID = 1;

  DeadlineExceeded(ErrorFacts facts) {
    super(facts);
  }
}
