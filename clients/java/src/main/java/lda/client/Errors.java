package lda.client;

import static java.util.Map.entry;

import com.google.protobuf.InvalidProtocolBufferException;
import com.google.protobuf.Message;
import io.grpc.Metadata;
import io.grpc.Status;
import io.grpc.StatusRuntimeException;
import java.time.Duration;
import java.util.List;
import java.util.Map;
import java.util.Optional;
import java.util.function.Function;
import lda.client.rpc.BadRequest;
import lda.client.rpc.ErrorInfo;
import lda.client.rpc.RetryInfo;

/** Makes an error of its class from a gRPC status. Knows nothing of channels, requests or streams. */
final class Errors {
  private static final String DOMAIN = "lda.v1";
  private static final Metadata.Key<byte[]> DETAILS =
      Metadata.Key.of("grpc-status-details-bin", Metadata.BINARY_BYTE_MARSHALLER);

  static final Map<String, Function<ErrorFacts, LdaClientError>> BY_REASON =
      Map.ofEntries(
          entry("VALIDATION_FAILED", ValidationFailed::new),
          entry("CONTEXT_EXCEEDED", ContextExceeded::new),
          entry("PROMPT_UNUSABLE", PromptUnusable::new),
          entry("NO_CHAT_TEMPLATE", NoChatTemplate::new),
          entry("TOKENIZERS_INCOMPATIBLE", TokenizersIncompatible::new),
          entry("LIMIT_EXCEEDED", LimitExceeded::new),
          entry("QUEUE_FULL", QueueFull::new),
          entry("SLOW_CONSUMER", SlowConsumer::new),
          entry("LOADING", Loading::new),
          entry("DRAINING", Draining::new),
          entry("WORKER_DIED", WorkerDied::new),
          entry("OUT_OF_MEMORY", OutOfMemory::new),
          entry("ABORTED", Aborted::new),
          entry("INTERNAL", InternalServerError::new),
          entry("DEADLINE_TOO_SHORT", DeadlineTooShort::new),
          entry("CALLER_LIMIT", CallerLimit::new),
          entry("UNAUTHENTICATED", Unauthenticated::new),
          entry("PERMISSION_DENIED", PermissionDenied::new),
          entry("UNKNOWN_GENERATION", UnknownGeneration::new));

  private Errors() {}

  /**
   * The error of a call.
   *
   * @param target the address called, for the message
   * @param answered whether the server had begun to answer, so that the connection was lost and not refused
   */
  static LdaClientError of(StatusRuntimeException cause, String target, boolean answered) {
    Status status = cause.getStatus();
    lda.client.rpc.Status details = details(cause.getTrailers());
    ErrorInfo info = detail(details, ErrorInfo.class, ErrorInfo.getDefaultInstance());
    if (!info.getDomain().equals(DOMAIN)) {
      info = ErrorInfo.getDefaultInstance();
    }
    boolean isAway = info.getReason().isEmpty() && status.getCode() == Status.Code.UNAVAILABLE;
    ErrorFacts facts =
        new ErrorFacts(
            isAway ? away(said(status), target, answered) : said(status),
            status.getCode(),
            info.getReason().isEmpty() ? null : info.getReason(),
            Map.copyOf(info.getMetadataMap()),
            violations(details),
            retryAfter(details));
    LdaClientError error = isAway ? new ServerAway(facts) : byReasonOrCode(facts);
    error.initCause(cause);
    return error;
  }

  /** The error for a connection that did not come up in time. */
  static ServerAway noConnection(String target, Duration waited) {
    String cause = "no connection within " + waited.toMillis() / 1e3 + " s";
    return new ServerAway(ErrorFacts.ofMessage(away(cause, target, false)));
  }

  /** The error for a stream that went against the contract. */
  static StreamBroken streamBroken(String finding) {
    String remedy = "Server and client may be of different versions.";
    return new StreamBroken(
        ErrorFacts.ofMessage("The stream broke its contract: " + finding + ". " + remedy));
  }

  private static LdaClientError byReasonOrCode(ErrorFacts facts) {
    Function<ErrorFacts, LdaClientError> known =
        facts.reason() == null ? null : BY_REASON.get(facts.reason());
    return known == null ? byCode(facts) : known.apply(facts);
  }

  /** For a status without a reason we know: one made by gRPC itself, a proxy, or a newer server. */
  private static LdaClientError byCode(ErrorFacts facts) {
    return switch (facts.code()) {
      case INVALID_ARGUMENT, FAILED_PRECONDITION, OUT_OF_RANGE, NOT_FOUND, ALREADY_EXISTS, UNIMPLEMENTED ->
          new RequestRejected(facts);
      case UNAUTHENTICATED, PERMISSION_DENIED -> new AccessDenied(facts);
      case UNAVAILABLE -> new Unavailable(facts);
      case RESOURCE_EXHAUSTED -> new Exhausted(facts);
      case DEADLINE_EXCEEDED -> new DeadlineExceeded(facts);
      case ABORTED, CANCELLED -> new Aborted(facts);
      case INTERNAL, UNKNOWN, DATA_LOSS -> new InternalServerError(facts);
      case OK -> new LdaClientError(facts);
    };
  }

  private static String said(Status status) {
    String description = Optional.ofNullable(status.getDescription()).orElse(status.getCode().name());
    return status.getCause() == null ? description : description + ": " + status.getCause().getMessage();
  }

  private static String away(String cause, String target, boolean answered) {
    if (answered) {
      return "The connection to %s was lost before the answer was complete (%s).".formatted(target, cause);
    }
    return "No LDA server answers at %s (%s): start it with `lda-service serve`, or give another target."
        .formatted(target, cause);
  }

  private static List<Violation> violations(lda.client.rpc.Status details) {
    return detail(details, BadRequest.class, BadRequest.getDefaultInstance()).getFieldViolationsList().stream()
        .map(each -> new Violation(each.getField(), each.getDescription()))
        .toList();
  }

  private static Duration retryAfter(lda.client.rpc.Status details) {
    RetryInfo info = detail(details, RetryInfo.class, null);
    if (info == null) {
      return null;
    }
    return Duration.ofSeconds(info.getRetryDelay().getSeconds(), info.getRetryDelay().getNanos());
  }

  /** The status in the trailers; an empty one if there is none or it cannot be read. */
  private static lda.client.rpc.Status details(Metadata trailers) {
    byte[] packed = trailers == null ? null : trailers.get(DETAILS);
    try {
      return lda.client.rpc.Status.parseFrom(packed == null ? new byte[0] : packed);
    } catch (InvalidProtocolBufferException unreadable) {
      return lda.client.rpc.Status.getDefaultInstance();
    }
  }

  /** The first detail of this kind that can be read. */
  private static <T extends Message> T detail(lda.client.rpc.Status details, Class<T> kind, T absent) {
    for (var each : details.getDetailsList()) {
      try {
        if (each.is(kind)) {
          return each.unpack(kind);
        }
      } catch (InvalidProtocolBufferException unreadable) {
        return absent;
      }
    }
    return absent;
  }
}
