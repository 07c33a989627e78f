package lda.client;

import io.grpc.Channel;
import io.grpc.ClientInterceptors;
import io.grpc.ConnectivityState;
import io.grpc.ManagedChannel;
import io.grpc.Metadata;
import io.grpc.StatusRuntimeException;
import io.grpc.stub.MetadataUtils;
import java.time.Duration;
import java.util.List;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.TimeUnit;
import java.util.function.Function;
import lda.v1.GenerateBothRequest;
import lda.v1.GenerateBothResponse;
import lda.v1.GenerateLDARequest;
import lda.v1.GenerateLDAResponse;
import lda.v1.GetModelPairRequest;
import lda.v1.GetModelPairResponse;
import lda.v1.LdaServiceGrpc;
import lda.v1.LdaServiceGrpc.LdaServiceBlockingStub;
import lda.v1.ScoreRequest;
import lda.v1.TokenizerCompatRequest;
import lda.v1.TokenizerCompatResponse;

/**
 * Client of one LDA server. Threads may share it.
 *
 * <pre>{@code
 * try (var client = LdaClient.builder().target("127.0.0.1:50051").build()) {
 *   var request = GenerateLDARequest.newBuilder().setPrompt(Prompts.text("Who are you?")).setAlpha(1).build();
 *   System.out.println(client.complete(request).get(0).text());
 * }
 * }</pre>
 *
 * <p>Every verb throws an {@link LdaClientError} if its call fails: the short ones and {@code complete} themselves, the
 * streams from iteration. A call that is refused with UNAVAILABLE before its first event is tried four times, within
 * about two seconds; nothing else is retried.
 */
public final class LdaClient implements AutoCloseable {
  private static final Metadata.Key<String> AUTHORIZATION =
      Metadata.Key.of("authorization", Metadata.ASCII_STRING_MARSHALLER);

  private final ManagedChannel connection;
  private final Channel channel;
  private final String target;
  private final Duration connectTimeout;
  private final Duration totalTimeout;
  private final Duration lookupTimeout;

  LdaClient(ManagedChannel connection, LdaClientBuilder options) {
    this.connection = connection;
    channel = options.token == null ? connection : withToken(connection, options.token);
    target = options.target;
    connectTimeout = options.connectTimeout;
    totalTimeout = options.totalTimeout;
    lookupTimeout = options.lookupTimeout;
  }

  /** Begins a client: target, token, TLS and timeouts. */
  public static LdaClientBuilder builder() {
    return new LdaClientBuilder();
  }

  /** Streams text sampled from {@code after + alpha * (after - before)}. */
  public GenerateStream<GenerateLDAResponse> generate(GenerateLDARequest request) {
    return generate(request, totalTimeout);
  }

  /** As {@link #generate(GenerateLDARequest)}, with a timeout for this call, from now to its last event. */
  public GenerateStream<GenerateLDAResponse> generate(GenerateLDARequest request, Duration timeout) {
    LdaServiceBlockingStub stub = stub(timeout);
    var grammar = new GenerateGrammar<GenerateLDAResponse>(GenerationEvent::of, sequences(request.getNumSequences()));
    return new GenerateStream<>(() -> stub.generateLDA(request), grammar, target);
  }

  /** Streams text sampled from each model on its own; the role tells them apart. */
  public GenerateStream<GenerateBothResponse> generateBoth(GenerateBothRequest request) {
    return generateBoth(request, totalTimeout);
  }

  /** As {@link #generateBoth(GenerateBothRequest)}, with a timeout for this call, from now to its last event. */
  public GenerateStream<GenerateBothResponse> generateBoth(GenerateBothRequest request, Duration timeout) {
    LdaServiceBlockingStub stub = stub(timeout);
    int asked = 2 * sequences(request.getNumSequences());
    var grammar = new GenerateGrammar<GenerateBothResponse>(GenerationEvent::of, asked);
    return new GenerateStream<>(() -> stub.generateBoth(request), grammar, target);
  }

  /** Teacher-forces a continuation through both models; streams it in blocks. */
  public ScoreStream score(ScoreRequest request) {
    return score(request, totalTimeout);
  }

  /** As {@link #score(ScoreRequest)}, with a timeout for this call, from now to its last block. */
  public ScoreStream score(ScoreRequest request, Duration timeout) {
    LdaServiceBlockingStub stub = stub(timeout);
    return new ScoreStream(() -> stub.score(request), target);
  }

  /** Generates and returns the finished sequences, in the order in which they finished. */
  public List<Completion> complete(GenerateLDARequest request) {
    return generate(request).gather();
  }

  /** As {@link #complete(GenerateLDARequest)}, with a timeout for this call. */
  public List<Completion> complete(GenerateLDARequest request, Duration timeout) {
    return generate(request, timeout).gather();
  }

  /** Whether the two tokenizers can be used as one pair, with the evidence. */
  public TokenizerCompatResponse tokenizerCompat() {
    return tokenizerCompat(lookupTimeout);
  }

  /** As {@link #tokenizerCompat()}, with a timeout for this call. */
  public TokenizerCompatResponse tokenizerCompat(Duration timeout) {
    return lookUp(timeout, stub -> stub.tokenizerCompat(TokenizerCompatRequest.getDefaultInstance()));
  }

  /** The loaded pair, the limits in force and the defaults of the server. */
  public GetModelPairResponse modelPair() {
    return modelPair(lookupTimeout);
  }

  /** As {@link #modelPair()}, with a timeout for this call. */
  public GetModelPairResponse modelPair(Duration timeout) {
    return lookUp(timeout, stub -> stub.getModelPair(GetModelPairRequest.getDefaultInstance()));
  }

  /** The channel, with the token on every call: for methods of the contract that have no verb here. */
  public Channel channel() {
    return channel;
  }

  /** Closes the connection; calls under way are cancelled. */
  @Override
  public void close() {
    connection.shutdownNow();
  }

  private <T> T lookUp(Duration timeout, Function<LdaServiceBlockingStub, T> call) {
    try {
      return call.apply(stub(timeout));
    } catch (StatusRuntimeException error) {
      throw Errors.of(error, target, false);
    }
  }

  private LdaServiceBlockingStub stub(Duration timeout) {
    if (connection.isShutdown()) {
      throw new IllegalStateException("This client is closed; build another one.");
    }
    awaitConnection();
    LdaServiceBlockingStub stub = LdaServiceGrpc.newBlockingStub(channel);
    if (timeout == null) {
      return stub;
    }
    return stub.withDeadlineAfter(LdaClientBuilder.positive(timeout).toNanos(), TimeUnit.NANOSECONDS);
  }

  /** With a connect timeout, a server that is starting has that long to come up. */
  private void awaitConnection() {
    if (connectTimeout == null) {
      return;
    }
    long deadline = System.nanoTime() + connectTimeout.toNanos();
    ConnectivityState state = connection.getState(true);
    while (state != ConnectivityState.READY) {
      CountDownLatch changed = new CountDownLatch(1);
      connection.notifyWhenStateChanged(state, changed::countDown);
      if (!await(changed, deadline - System.nanoTime())) {
        throw Errors.noConnection(target, connectTimeout);
      }
      state = connection.getState(true);
    }
  }

  private static boolean await(CountDownLatch latch, long nanos) {
    try {
      return latch.await(nanos, TimeUnit.NANOSECONDS);
    } catch (InterruptedException interrupt) {
      Thread.currentThread().interrupt();
      throw new Aborted(ErrorFacts.ofMessage("The thread was interrupted while it waited for a connection."));
    }
  }

  private static int sequences(int asked) {
    return asked == 0 ? 1 : asked;
  }

  private static Channel withToken(Channel channel, String token) {
    Metadata headers = new Metadata();
    headers.put(AUTHORIZATION, "Bearer " + token);
    return ClientInterceptors.intercept(channel, MetadataUtils.newAttachHeadersInterceptor(headers));
  }
}
