package lda.client;

/** No generation of this id is open on this server. Metadata: {@code generation_id}. */
public final class UnknownGeneration extends RequestRejected {
  private static final long serialVersionUID = 1;

  UnknownGeneration(ErrorFacts facts) {
    super(facts);
  }
}
