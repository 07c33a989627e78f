package lda.client;

import io.grpc.Status;
import java.io.Serializable;
import java.time.Duration;
import java.util.List;
import java.util.Map;

/** What an error carries; null for what was not received. Collections are immutable. */
record ErrorFacts(
    String message,
    Status.Code code,
    String reason,
    Map<String, String> metadata,
    List<Violation> violations,
    Duration retryAfter)
    implements Serializable {

  static ErrorFacts ofMessage(String message) {
    return new ErrorFacts(message, null, null, Map.of(), List.of(), null);
  }
}
