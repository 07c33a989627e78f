package lda.client;

/** Nobody answers at the target, or the connection to it was lost. */
public final class ServerAway extends Unavailable {
  private static final long serialVersionUID = 1;

  ServerAway(ErrorFacts facts) {
    super(facts);
  }
}
