package lda.client;

import static lda.client.ScriptedServer.finished;
import static lda.client.ScriptedServer.started;
import static org.junit.Assert.assertEquals;
import static org.junit.Assert.assertThrows;

import io.grpc.Status;
import io.grpc.StatusRuntimeException;
import lda.v1.GenerateLDARequest;
import org.junit.After;
import org.junit.Before;
import org.junit.Test;

public class RetryTest {
  private static final StatusRuntimeException UNAVAILABLE = new StatusRuntimeException(Status.UNAVAILABLE);
  private static final GenerateLDARequest REQUEST = GenerateLDARequest.getDefaultInstance();

  private ScriptedServer server;
  private LdaClient client;

  @Before
  public void connect() throws Exception {
    server = new ScriptedServer();
    client = server.client();
  }

  @After
  public void disconnect() {
    client.close();
    server.close();
  }

  /** A server that is unavailable three times is not noticed. */
  @Test
  public void theFourthAttemptCounts() {
    server.play(
        call -> {
          if (server.calls.get() < 4) {
            call.onError(UNAVAILABLE);
            return;
          }
          call.onNext(started(1));
          call.onNext(finished(0));
          call.onCompleted();
        });
    assertEquals(1, client.complete(REQUEST).size());
    assertEquals(4, server.calls.get());
  }

  /** There is no fifth attempt. */
  @Test
  public void fourAttemptsNoMore() {
    server.play(call -> call.onError(UNAVAILABLE));
    assertThrows(ServerAway.class, () -> client.complete(REQUEST));
    assertEquals(4, server.calls.get());
  }

  /** A request of many megabytes is tried again like any other. */
  @Test
  public void largeRequestsAreRetried() {
    server.play(call -> call.onError(UNAVAILABLE));
    var large = GenerateLDARequest.newBuilder().setPrompt(Prompts.text("w".repeat(3 << 20))).build();
    assertThrows(ServerAway.class, () -> client.complete(large));
    assertEquals(4, server.calls.get());
  }

  /** Once an event has come nothing is tried again, so no text comes twice. */
  @Test
  public void notAfterTheFirstEvent() {
    server.play(
        call -> {
          call.onNext(started(1));
          call.onError(UNAVAILABLE);
        });
    assertThrows(ServerAway.class, () -> client.complete(REQUEST));
    assertEquals(1, server.calls.get());
  }

  /** Nothing but UNAVAILABLE is tried again. */
  @Test
  public void notForOtherCodes() {
    server.play(call -> call.onError(new StatusRuntimeException(Status.RESOURCE_EXHAUSTED)));
    assertThrows(Exhausted.class, () -> client.complete(REQUEST));
    assertEquals(1, server.calls.get());
  }
}
