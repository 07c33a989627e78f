package lda.client;

import io.grpc.Status;
import java.time.Duration;
import java.util.List;
import java.util.Map;
import java.util.Optional;
import java.util.stream.Collectors;
import java.util.stream.Stream;

/**
 * Base of every error of a call. A bad argument that never leaves the process is an ordinary {@link
 * IllegalArgumentException}.
 *
 * <pre>
 * LdaClientError
 *   RequestRejected         the request cannot be served as it stands; change it
 *     ValidationFailed, ContextExceeded, PromptUnusable, NoChatTemplate, LimitExceeded, TokenizersIncompatible,
 *     UnknownGeneration
 *     AccessDenied
 *       Unauthenticated, PermissionDenied
 *   Unavailable             nothing is wrong with the request; try again later or elsewhere
 *     Loading, Draining, WorkerDied, ServerAway
 *   Exhausted               something ran out
 *     QueueFull, CallerLimit, SlowConsumer, OutOfMemory
 *   DeadlineExceeded        the timeout of the call went by
 *     DeadlineTooShort
 *   Aborted                 an operator, a shutdown or an interrupt ended the call
 *   InternalServerError     a fault of the server
 *   StreamBroken            the stream ended or went on against the contract
 * </pre>
 */
public class LdaClientError extends RuntimeException {
  private static final long serialVersionUID = 1;

  private final ErrorFacts facts;

  LdaClientError(ErrorFacts facts) {
    super(facts.message());
    this.facts = facts;
  }

  /** The gRPC status code; empty where no status was received. */
  public Optional<Status.Code> code() {
    return Optional.ofNullable(facts.code());
  }

  /** The name of the {@link lda.v1.ErrorReason} without its prefix, such as {@code QUEUE_FULL}. */
  public Optional<String> reason() {
    return Optional.ofNullable(facts.reason());
  }

  /** The facts that the contract documents for the reason. */
  public Map<String, String> metadata() {
    return facts.metadata();
  }

  /** The fields at fault. */
  public List<Violation> violations() {
    return facts.violations();
  }

  /** After how long the server suggests to try again. */
  public Optional<Duration> retryAfter() {
    return Optional.ofNullable(facts.retryAfter());
  }

  /** The class, the message, and the violations that the message does not name. */
  @Override
  public String toString() {
    Stream<String> unsaid =
        violations().stream()
            .filter(each -> !getMessage().contains(each.field()))
            .map(each -> each.field() + ": " + each.description());
    return Stream.concat(Stream.of(super.toString()), unsaid).collect(Collectors.joining("; "));
  }
}
