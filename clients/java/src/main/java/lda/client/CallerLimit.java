package lda.client;

/** This caller has as many requests open as one caller may. Metadata: {@code open}, {@code limit}. */
public final class CallerLimit extends Exhausted {
  private static final long serialVersionUID = 1;

  CallerLimit(ErrorFacts facts) {
    super(facts);
  }
}
