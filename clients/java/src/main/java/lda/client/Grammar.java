package lda.client;

/** Follows a stream event by event. */
interface Grammar<E> {
  /** Whether this event holds nothing that this version of the contract knows. */
  boolean isUnknown(E event);

  /** Checks one known event. Throws {@link StreamBroken}. */
  void observe(E event);

  /** Checks that the stream may end here with OK. Throws {@link StreamBroken}. */
  void end();

  static void check(boolean holds, String finding, Object... values) {
    if (!holds) {
      throw Errors.streamBroken(finding.formatted(values));
    }
  }
}
