package lda.client;

/** The stream ended or went on against the contract, such as an OK end before every sequence had finished. */
public final class StreamBroken extends LdaClientError {
  private static final long serialVersionUID = 1;

  StreamBroken(ErrorFacts facts) {
    super(facts);
  }
}
