package lda.client;

/**
 * Refused at once: the expected wait is longer than the timeout. Metadata: {@code expected_wait_ms},
 * {@code remaining_ms}.
 */
public final class DeadlineTooShort extends DeadlineExceeded {
  private static final long serialVersionUID = 1;

  DeadlineTooShort(ErrorFacts facts) {
    super(facts);
  }
}
