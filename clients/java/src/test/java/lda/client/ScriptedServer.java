package lda.client;

import io.grpc.InsecureServerCredentials;
import io.grpc.Metadata;
import io.grpc.Server;
import io.grpc.ServerCall;
import io.grpc.ServerCallHandler;
import io.grpc.ServerCredentials;
import io.grpc.ServerInterceptor;
import io.grpc.netty.NettyServerBuilder;
import io.grpc.stub.ServerCallStreamObserver;
import io.grpc.stub.StreamObserver;
import java.io.IOException;
import java.net.InetAddress;
import java.net.InetSocketAddress;
import java.util.List;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.LinkedBlockingQueue;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.atomic.AtomicInteger;
import java.util.logging.Level;
import java.util.logging.Logger;
import lda.v1.Finished;
import lda.v1.GenerateBothRequest;
import lda.v1.GenerateBothResponse;
import lda.v1.GenerateLDARequest;
import lda.v1.GenerateLDAResponse;
import lda.v1.GetModelPairRequest;
import lda.v1.GetModelPairResponse;
import lda.v1.LdaServiceGrpc;
import lda.v1.ScoreRequest;
import lda.v1.ScoreResponse;
import lda.v1.Started;
import lda.v1.TokenDelta;

/** A real server on a free port of the loopback that plays one script to every streaming call. */
final class ScriptedServer extends LdaServiceGrpc.LdaServiceImplBase implements AutoCloseable {
  /** What a call is answered with. */
  interface Script {
    void play(ServerCallStreamObserver<Object> call);
  }

  // gRPC tells the log of every chunk of a call that is over.
  private static final Logger GRPC_LOG = Logger.getLogger("io.grpc");

  static {
    GRPC_LOG.setLevel(Level.SEVERE);
  }

  private static final Metadata.Key<String> AUTHORIZATION =
      Metadata.Key.of("authorization", Metadata.ASCII_STRING_MARSHALLER);

  /** How many calls began. */
  final AtomicInteger calls = new AtomicInteger();

  /** Falls when a call was cancelled by its client. */
  final CountDownLatch cancelled = new CountDownLatch(1);

  /** The authorization header of every call, "none" without. */
  final LinkedBlockingQueue<String> authorizations = new LinkedBlockingQueue<>();

  private final Server server;
  private volatile Script script = ScriptedServer::hold;

  ScriptedServer() throws IOException {
    this(InsecureServerCredentials.create());
  }

  ScriptedServer(ServerCredentials credentials) throws IOException {
    var address = new InetSocketAddress(InetAddress.getLoopbackAddress(), 0);
    server =
        NettyServerBuilder.forAddress(address, credentials)
            .addService(this)
            .intercept(new Recorder())
            .build()
            .start();
  }

  ScriptedServer play(Script script) {
    this.script = script;
    return this;
  }

  /** Plays these messages, then OK. */
  ScriptedServer play(Object... messages) {
    return play(
        call -> {
          List.of(messages).forEach(call::onNext);
          call.onCompleted();
        });
  }

  String target() {
    return "127.0.0.1:" + server.getPort();
  }

  LdaClient client() {
    return LdaClient.builder().target(target()).build();
  }

  void awaitCancelled() throws InterruptedException {
    if (!cancelled.await(10, TimeUnit.SECONDS)) {
      throw new AssertionError("no call was cancelled");
    }
  }

  @Override
  public void generateLDA(GenerateLDARequest request, StreamObserver<GenerateLDAResponse> call) {
    answer(call);
  }

  @Override
  public void generateBoth(GenerateBothRequest request, StreamObserver<GenerateBothResponse> call) {
    answer(call);
  }

  @Override
  public void score(ScoreRequest request, StreamObserver<ScoreResponse> call) {
    answer(call);
  }

  @Override
  public void getModelPair(GetModelPairRequest request, StreamObserver<GetModelPairResponse> call) {
    call.onNext(GetModelPairResponse.newBuilder().setServerVersion("scripted").build());
    call.onCompleted();
  }

  @SuppressWarnings("unchecked")
  private void answer(StreamObserver<?> observer) {
    var call = (ServerCallStreamObserver<Object>) observer;
    call.setOnCancelHandler(cancelled::countDown);
    script.play(call);
  }

  @Override
  public void close() {
    server.shutdownNow();
  }

  /** Never answers. */
  static void hold(ServerCallStreamObserver<Object> call) {}

  static GenerateLDAResponse started(int sequences) {
    Started.Builder started = Started.newBuilder().setSeed(7).setSequenceCount(sequences);
    return GenerateLDAResponse.newBuilder().setStarted(started).build();
  }

  static GenerateLDAResponse delta(int sequence, String text) {
    TokenDelta.Builder delta = TokenDelta.newBuilder().setSequenceIndex(sequence).setText(text);
    return GenerateLDAResponse.newBuilder().setDelta(delta).build();
  }

  static GenerateLDAResponse finished(int sequence) {
    Finished.Builder finished = Finished.newBuilder().setSequenceIndex(sequence);
    return GenerateLDAResponse.newBuilder().setFinished(finished).build();
  }

  private final class Recorder implements ServerInterceptor {
    @Override
    public <I, O> ServerCall.Listener<I> interceptCall(
        ServerCall<I, O> call, Metadata headers, ServerCallHandler<I, O> next) {
      calls.incrementAndGet();
      String authorization = headers.get(AUTHORIZATION);
      authorizations.add(authorization == null ? "none" : authorization);
      return next.startCall(call, headers);
    }
  }
}
