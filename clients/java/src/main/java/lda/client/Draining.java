package lda.client;

/** The server is shutting down and takes no new work. */
public final class Draining extends Unavailable {
  private static final long serialVersionUID = 1;

  Draining(ErrorFacts facts) {
    super(facts);
  }
}
