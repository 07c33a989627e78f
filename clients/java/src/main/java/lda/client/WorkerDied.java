package lda.client;

/** The process that owns the models died; a fresh one is being started. */
public final class WorkerDied extends Unavailable {
  private static final long serialVersionUID = 1;

  WorkerDied(ErrorFacts facts) {
    super(facts);
  }
}
