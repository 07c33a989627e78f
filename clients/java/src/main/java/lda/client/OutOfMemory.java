package lda.client;

/** Device memory of the server ran out while serving this request. */
public final class OutOfMemory extends Exhausted {
  private static final long serialVersionUID = 1;

  OutOfMemory(ErrorFacts facts) {
    super(facts);
  }
}
