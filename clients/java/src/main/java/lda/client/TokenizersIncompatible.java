package lda.client;

/** The two vocabularies do not match; {@link LdaClient#tokenizerCompat()} says where. */
public final class TokenizersIncompatible extends RequestRejected {
  private static final long serialVersionUID = 1;

  TokenizersIncompatible(ErrorFacts facts) {
    super(facts);
  }
}
