package lda.client;

/** Something ran out: room in the queue, patience with a slow reader, or memory. */
public class Exhausted extends LdaClientError {
  private static final long serialVersionUID = 1;

  Exhausted(ErrorFacts facts) {
    super(facts);
  }
}
