package lda.client;

import static lda.client.ScriptedServer.delta;
import static lda.client.ScriptedServer.finished;
import static lda.client.ScriptedServer.started;
import static org.junit.Assert.assertEquals;
import static org.junit.Assert.assertFalse;
import static org.junit.Assert.assertThrows;
import static org.junit.Assert.assertTrue;

import com.google.protobuf.UnknownFieldSet;
import io.grpc.Context;
import io.grpc.stub.ServerCallStreamObserver;
import java.util.ArrayList;
import java.util.List;
import java.util.NoSuchElementException;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.atomic.AtomicInteger;
import lda.v1.Finished;
import lda.v1.GenerateBothRequest;
import lda.v1.GenerateBothResponse;
import lda.v1.GenerateLDARequest;
import lda.v1.GenerateLDAResponse;
import lda.v1.ModelRole;
import lda.v1.ScoreRequest;
import lda.v1.ScoreResponse;
import lda.v1.Started;
import lda.v1.Token;
import org.junit.After;
import org.junit.Before;
import org.junit.Test;

public class StreamTest {
  private static final GenerateLDARequest HI = GenerateLDARequest.newBuilder().setPrompt(Prompts.text("hi")).build();

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

  /** A stream gives every event in order, then ends, and goes on saying so. */
  @Test
  public void eventsInOrder() {
    List<GenerateLDAResponse> script = List.of(started(1), delta(0, "a"), delta(0, "b"), finished(0));
    server.play(script.toArray());
    var seen = new ArrayList<GenerateLDAResponse>();
    try (var stream = client.generate(HI)) {
      stream.forEach(seen::add);
      assertFalse(stream.hasNext());
      assertThrows(NoSuchElementException.class, stream::next);
      assertFalse(stream.isCancelled());
    }
    assertEquals(script, seen);
  }

  /** Asking twice whether there is another event loses none. */
  @Test
  public void hasNextKeepsTheEvent() {
    server.play(started(1), finished(0));
    try (var stream = client.generate(HI)) {
      assertTrue(stream.hasNext() && stream.hasNext());
      assertTrue(stream.next().hasStarted());
      assertEquals(7, stream.started().orElseThrow().getSeed());
      assertTrue(stream.next().hasFinished());
    }
  }

  /** Leaving a try-with-resources early cancels the call on the server, and the stream is then over. */
  @Test
  public void leavingCancels() throws Exception {
    server.play(call -> call.onNext(started(1)));
    GenerateStream<GenerateLDAResponse> stream = client.generate(HI);
    try (stream) {
      assertTrue(stream.next().hasStarted());
    }
    server.awaitCancelled();
    assertTrue(stream.isCancelled());
    assertFalse(stream.hasNext());
  }

  /** A stream that is closed from another thread ends for the thread that waits in it, without an error. */
  @Test
  public void closingFromAnotherThreadEndsIteration() throws Exception {
    server.play(call -> call.onNext(started(1)));
    var stream = client.generate(HI);
    stream.next();
    var reading = CompletableFuture.supplyAsync(stream::hasNext);
    stream.close();
    assertFalse(reading.get(10, TimeUnit.SECONDS));
    server.awaitCancelled();
  }

  /** An interrupt of the reading thread cancels the call, raises Aborted, and stays visible to the thread. */
  @Test
  public void interruptCancels() throws Exception {
    server.play(call -> call.onNext(started(1)));
    var begun = new CountDownLatch(1);
    var interrupted = new CompletableFuture<Boolean>();
    Thread reader = new Thread(() -> interrupted.complete(readUntilInterrupted(begun)));
    reader.start();
    assertTrue(begun.await(10, TimeUnit.SECONDS));
    reader.interrupt();
    assertTrue(interrupted.get(10, TimeUnit.SECONDS));
    server.awaitCancelled();
  }

  private boolean readUntilInterrupted(CountDownLatch begun) {
    try (var stream = client.generate(HI)) {
      stream.next();
      begun.countDown();
      assertThrows(Aborted.class, stream::hasNext);
      return Thread.currentThread().isInterrupted();
    }
  }

  /** Cancelling the gRPC context in which a stream began cancels the call. */
  @Test
  public void contextCancels() throws Exception {
    server.play(call -> call.onNext(started(1)));
    try (var context = Context.current().withCancellation()) {
      var stream = context.wrap(() -> client.generate(HI)).call();
      stream.next();
      context.cancel(null);
      assertThrows(Aborted.class, stream::hasNext);
    }
    server.awaitCancelled();
  }

  /** Closing the client ends its streams and allows no further call. */
  @Test
  public void closingTheClientEndsItsStreams() throws Exception {
    server.play(call -> call.onNext(started(1)));
    var stream = client.generate(HI);
    stream.next();
    client.close();
    assertThrows(ServerAway.class, stream::hasNext);
    assertThrows(IllegalStateException.class, () -> client.generate(HI));
    server.awaitCancelled();
  }

  /** A reader that stops reading stops the server: what waits for it is bounded. */
  @Test
  public void aSlowReaderHoldsUpTheServer() {
    var flood = new Flood(400);
    server.play(flood);
    try (var stream = client.generate(HI)) {
      stream.next();
      stream.next();
      assertTrue("the server sent everything", sentWhenQuiet(flood) < flood.events);
      stream.forEachRemaining(event -> {});
    }
    assertEquals(flood.events, flood.sent.get());
  }

  /** How much was sent once a hundred questions and answers have crossed the connection and nothing else has. */
  private int sentWhenQuiet(Flood flood) {
    int sent = -1;
    while (sent != flood.sent.get()) {
      sent = flood.sent.get();
      for (int round = 0; round < 100; round++) {
        client.modelPair();
      }
    }
    return sent;
  }

  /** Events of 256 KiB, for as long as the call takes more. */
  private static final class Flood implements ScriptedServer.Script {
    private final GenerateLDAResponse wide = delta(0, "w".repeat(256 << 10));
    private final AtomicInteger sent = new AtomicInteger();
    private final int events;

    Flood(int events) {
      this.events = events;
    }

    @Override
    public void play(ServerCallStreamObserver<Object> call) {
      call.setOnReadyHandler(() -> pour(call));
      call.onNext(started(1));
    }

    private void pour(ServerCallStreamObserver<Object> call) {
      while (call.isReady() && sent.get() < events) {
        call.onNext(wide);
        if (sent.incrementAndGet() == events) {
          call.onNext(finished(0));
          call.onCompleted();
        }
      }
    }
  }

  /** An event that only a newer contract knows is skipped, wherever it comes. */
  @Test
  public void unknownEventsAreSkipped() {
    var field = UnknownFieldSet.Field.newBuilder().addVarint(1).build();
    var fields = UnknownFieldSet.newBuilder().addField(15, field).build();
    var newer = GenerateLDAResponse.newBuilder().setUnknownFields(fields).build();
    server.play(newer, started(1), newer, delta(0, "a"), finished(0), newer);
    assertEquals("a", client.complete(HI).get(0).text());
  }

  /** A stream against the grammar is StreamBroken, is cancelled, and is over. */
  @Test
  public void brokenStreams() throws Exception {
    breaks("before `started`");
    breaks("when 0 of 1", started(1));
    breaks("when 1 of 2", started(2), finished(1));
    breaks("twice", started(1), started(1));
    breaks("did not begin", delta(0, "a"));
    breaks("after it had finished", started(2), finished(0), delta(0, "a"));
    breaks("no sequence 3", started(2), finished(3));
    server.play(call -> call.onNext(finished(0)));
    var stream = client.generate(HI);
    assertThrows(StreamBroken.class, stream::hasNext);
    assertFalse(stream.hasNext());
    server.awaitCancelled();
  }

  private void breaks(String finding, GenerateLDAResponse... script) {
    server.play((Object[]) script);
    var error = assertThrows(StreamBroken.class, () -> client.generate(HI).forEachRemaining(event -> {}));
    assertTrue(error.getMessage(), error.getMessage().contains(finding));
    assertTrue(error.code().isEmpty());
  }

  /** Without a count in `started`, as many sequences must finish as were asked for. */
  @Test
  public void withoutACountTheRequestDecides() {
    server.play(started(0), finished(0));
    assertThrows(StreamBroken.class, () -> client.complete(HI.toBuilder().setNumSequences(2).build()));
    assertEquals(1, client.complete(HI).size());
  }

  /** Interleaved sequences are gathered apart, in the order in which they finished. */
  @Test
  public void complete() {
    server.play(started(2), delta(0, "a"), delta(1, "x"), delta(0, "b"), finished(1), finished(0));
    List<Completion> completions = client.complete(HI.toBuilder().setNumSequences(2).build());
    assertEquals(List.of("x", "ab"), completions.stream().map(Completion::text).toList());
    assertEquals(List.of(1, 0), completions.stream().map(Completion::sequenceIndex).toList());
    assertEquals(7, completions.get(0).started().getSeed());
  }

  /** Only a whole stream can be gathered. */
  @Test
  public void gatherNeedsTheWholeStream() {
    server.play(started(1), finished(0));
    var begun = client.generate(HI);
    begun.next();
    assertThrows(IllegalStateException.class, begun::gather);
    begun.close();
    var closed = client.generate(HI);
    closed.close();
    assertThrows(StreamBroken.class, closed::gather);
  }

  /** The same index under another role is another sequence. */
  @Test
  public void rolesAreApart() {
    server.play(
        GenerateBothResponse.newBuilder().setStarted(Started.newBuilder().setSequenceCount(2)).build(),
        finishedOf(ModelRole.MODEL_ROLE_AFTER),
        finishedOf(ModelRole.MODEL_ROLE_BEFORE));
    List<Completion> completions = client.generateBoth(GenerateBothRequest.getDefaultInstance()).gather();
    assertEquals(ModelRole.MODEL_ROLE_AFTER, completions.get(0).role());
    assertEquals(ModelRole.MODEL_ROLE_BEFORE, completions.get(1).role());
  }

  private static GenerateBothResponse finishedOf(ModelRole role) {
    return GenerateBothResponse.newBuilder().setFinished(Finished.newBuilder().setRole(role)).build();
  }

  /** Scored blocks follow on one another up to the announced total. */
  @Test
  public void score() {
    server.play(block(0, 3, 2), block(2, 3, 1));
    var offsets = new ArrayList<Integer>();
    client.score(ScoreRequest.getDefaultInstance()).forEach(each -> offsets.add(each.getOffset()));
    assertEquals(List.of(0, 2), offsets);
    for (Object[] broken : new Object[][] {{}, {block(0, 3, 2)}, {block(0, 3, 1), block(2, 3, 1)}}) {
      server.play(broken);
      var stream = client.score(ScoreRequest.getDefaultInstance());
      assertThrows(StreamBroken.class, () -> stream.forEachRemaining(each -> {}));
    }
  }

  private static ScoreResponse block(int offset, int total, int tokens) {
    ScoreResponse.Builder block = ScoreResponse.newBuilder().setOffset(offset).setTotalTokenCount(total);
    for (int token = 0; token < tokens; token++) {
      block.addTokens(Token.getDefaultInstance());
    }
    return block.build();
  }
}
