/** What the samples share. */
final class Sample {
  private Sample() {}

  /** Where the server of the samples listens. */
  static String target() {
    return System.getenv().getOrDefault("LDA_TARGET", "127.0.0.1:50051");
  }

  static void check(boolean holds, String finding) {
    if (!holds) {
      throw new AssertionError(finding);
    }
  }
}
