package lda.client;

import static org.junit.Assert.assertEquals;
import static org.junit.Assert.assertNotEquals;
import static org.junit.Assert.assertSame;
import static org.junit.Assert.assertTrue;

import com.google.protobuf.Any;
import com.google.protobuf.ByteString;
import com.google.protobuf.Message;
import io.grpc.Metadata;
import io.grpc.Status;
import io.grpc.StatusRuntimeException;
import java.time.Duration;
import java.util.List;
import java.util.Map;
import lda.client.rpc.BadRequest;
import lda.client.rpc.ErrorInfo;
import lda.client.rpc.RetryInfo;
import lda.v1.ErrorReason;
import org.junit.Test;

public class ErrorsTest {
  private static final Metadata.Key<byte[]> DETAILS =
      Metadata.Key.of("grpc-status-details-bin", Metadata.BINARY_BYTE_MARSHALLER);

  /** Every reason of the contract has a class of its own. */
  @Test
  public void everyReasonHasAClass() {
    for (ErrorReason reason : ErrorReason.values()) {
      if (reason == ErrorReason.ERROR_REASON_UNSPECIFIED || reason == ErrorReason.UNRECOGNIZED) {
        continue;
      }
      String name = reason.name().substring("ERROR_REASON_".length());
      var error = error(Status.OK, info(name, "lda.v1"));
      assertNotEquals(reason.name(), LdaClientError.class, error.getClass());
      assertEquals(name, error.reason().orElseThrow());
    }
    assertEquals(ErrorReason.values().length - 2, Errors.BY_REASON.size());
  }

  /** A status without a known reason goes by its code. */
  @Test
  public void codesWithoutAReason() {
    Map<Class<?>, List<Status.Code>> expected =
        Map.of(
            RequestRejected.class,
                List.of(
                    Status.Code.INVALID_ARGUMENT,
                    Status.Code.FAILED_PRECONDITION,
                    Status.Code.OUT_OF_RANGE,
                    Status.Code.NOT_FOUND,
                    Status.Code.ALREADY_EXISTS,
                    Status.Code.UNIMPLEMENTED),
            AccessDenied.class, List.of(Status.Code.UNAUTHENTICATED, Status.Code.PERMISSION_DENIED),
            ServerAway.class, List.of(Status.Code.UNAVAILABLE),
            Exhausted.class, List.of(Status.Code.RESOURCE_EXHAUSTED),
            DeadlineExceeded.class, List.of(Status.Code.DEADLINE_EXCEEDED),
            Aborted.class, List.of(Status.Code.ABORTED, Status.Code.CANCELLED),
            InternalServerError.class, List.of(Status.Code.INTERNAL, Status.Code.UNKNOWN, Status.Code.DATA_LOSS));
    expected.forEach(
        (kind, codes) -> {
          for (Status.Code code : codes) {
            assertSame(code.name(), kind, error(code.toStatus()).getClass());
            assertEquals(code, error(code.toStatus()).code().orElseThrow());
          }
        });
  }

  /** The classes are related as the tree says. */
  @Test
  public void tree() {
    Map<Class<?>, List<Class<?>>> children =
        Map.of(
            LdaClientError.class,
                List.of(
                    RequestRejected.class,
                    Unavailable.class,
                    Exhausted.class,
                    DeadlineExceeded.class,
                    Aborted.class,
                    InternalServerError.class,
                    StreamBroken.class),
            RequestRejected.class,
                List.of(
                    ValidationFailed.class,
                    ContextExceeded.class,
                    PromptUnusable.class,
                    NoChatTemplate.class,
                    LimitExceeded.class,
                    TokenizersIncompatible.class,
                    UnknownGeneration.class,
                    AccessDenied.class),
            AccessDenied.class, List.of(Unauthenticated.class, PermissionDenied.class),
            Unavailable.class, List.of(Loading.class, Draining.class, WorkerDied.class, ServerAway.class),
            Exhausted.class,
                List.of(QueueFull.class, CallerLimit.class, SlowConsumer.class, OutOfMemory.class),
            DeadlineExceeded.class, List.of(DeadlineTooShort.class));
    children.forEach((parent, kinds) -> kinds.forEach(kind -> assertSame(parent, kind.getSuperclass())));
  }

  /** A reason that only a newer server knows, or that is somebody else's, goes by the code. */
  @Test
  public void unknownReasons() {
    var newer = error(Status.UNAVAILABLE, info("MOVING", "lda.v1"));
    assertSame(Unavailable.class, newer.getClass());
    assertEquals("MOVING", newer.reason().orElseThrow());
    var foreign = error(Status.RESOURCE_EXHAUSTED, info("QUEUE_FULL", "proxy.example"));
    assertSame(Exhausted.class, foreign.getClass());
    assertTrue(foreign.reason().isEmpty());
  }

  /** Violations, facts and the suggested wait are read; a violation that the message leaves out is shown. */
  @Test
  public void details() {
    var bad = BadRequest.newBuilder();
    bad.addFieldViolationsBuilder().setField("sampling.top_p").setDescription("must be at most 1");
    var retry = RetryInfo.newBuilder();
    retry.getRetryDelayBuilder().setSeconds(2).setNanos(500_000_000);
    var info = info("VALIDATION_FAILED", "lda.v1").toBuilder().putMetadata("limit", "1").build();
    var error = error(Status.INVALID_ARGUMENT.withDescription("No."), info, bad.build(), retry.build());
    assertEquals(List.of(new Violation("sampling.top_p", "must be at most 1")), error.violations());
    assertEquals(Map.of("limit", "1"), error.metadata());
    assertEquals(Duration.ofMillis(2500), error.retryAfter().orElseThrow());
    assertEquals("No.", error.getMessage());
    assertEquals("lda.client.ValidationFailed: No.; sampling.top_p: must be at most 1", error.toString());
  }

  /** Details that cannot be read leave the code and the message. */
  @Test
  public void unreadableDetails() {
    var trailers = new Metadata();
    trailers.put(DETAILS, new byte[] {-1, -1, -1});
    var garbage = Errors.of(new StatusRuntimeException(Status.ABORTED.withDescription("Over."), trailers), "t", false);
    assertSame(Aborted.class, garbage.getClass());
    assertEquals("Over.", garbage.getMessage());
    var value = ByteString.copyFrom(new byte[] {-1});
    var broken = Any.newBuilder().setTypeUrl("x/google.rpc.ErrorInfo").setValue(value).build();
    assertSame(Exhausted.class, Errors.of(packed(Status.RESOURCE_EXHAUSTED, List.of(broken)), "t", false).getClass());
  }

  /** Nobody there, and a connection lost in mid-stream, are told apart in words and name the target. */
  @Test
  public void away() {
    var cause = new StatusRuntimeException(Status.UNAVAILABLE.withDescription("io exception"));
    assertTrue(Errors.of(cause, "host:1", false).getMessage().startsWith("No LDA server answers at host:1"));
    assertTrue(Errors.of(cause, "host:1", true).getMessage().startsWith("The connection to host:1 was lost"));
    assertSame(cause, Errors.of(cause, "host:1", true).getCause());
  }

  private static ErrorInfo info(String reason, String domain) {
    return ErrorInfo.newBuilder().setReason(reason).setDomain(domain).build();
  }

  private static LdaClientError error(Status status, Message... details) {
    return Errors.of(packed(status, List.of(details).stream().map(Any::pack).toList()), "target", false);
  }

  private static StatusRuntimeException packed(Status status, List<Any> details) {
    var trailers = new Metadata();
    trailers.put(DETAILS, lda.client.rpc.Status.newBuilder().addAllDetails(details).build().toByteArray());
    return new StatusRuntimeException(status, trailers);
  }
}
