import java.util.concurrent.TimeUnit;
import lda.client.GenerateStream;
import lda.client.LdaClient;
import lda.client.Prompts;
import lda.v1.GenerateLDARequest;
import lda.v1.GenerateLDAResponse;
import lda.v1.GetLoadRequest;
import lda.v1.LdaServiceGrpc;
import lda.v1.LdaServiceGrpc.LdaServiceBlockingStub;
import lda.v1.Stopping;

/** A generation that is left after three tokens, and the server that is free again. */
public final class Cancel {
  private static final long FREE_WITHIN_MS = 10_000;
  private static final long POLL_MS = 20;

  private Cancel() {}

  public static void main(String[] arguments) throws InterruptedException {
    GenerateLDARequest request =
        GenerateLDARequest.newBuilder()
            .setPrompt(Prompts.chat(Prompts.turn("user", "Who are you?")))
            .setStopping(Stopping.newBuilder().setMaxNewTokens(400).setIgnoreEos(true))
            .build();
    try (LdaClient client = LdaClient.builder().target(Sample.target()).build()) {
      leaveAfterThreeTokens(client, request);
      awaitFree(LdaServiceGrpc.newBlockingStub(client.channel()));
    }
    System.out.println("ok");
  }

  private static void leaveAfterThreeTokens(LdaClient client, GenerateLDARequest request) {
    // section:cancel
    GenerateStream<GenerateLDAResponse> stream = client.generate(request);
    try (stream) {
      int tokens = 0;
      while (tokens < 3 && stream.hasNext()) {
        tokens += stream.next().getDelta().getTokensCount();
      }
    }
    // endsection:cancel
    Sample.check(stream.isCancelled(), "the generation was over before it was left");
  }

  /** Cancelling travels to the server and takes effect at its next decoding step. */
  private static void awaitFree(LdaServiceBlockingStub stub) throws InterruptedException {
    long deadline = System.nanoTime() + TimeUnit.MILLISECONDS.toNanos(FREE_WITHIN_MS);
    while (stub.getLoad(GetLoadRequest.getDefaultInstance()).getOpenRequests() > 0) {
      Sample.check(System.nanoTime() < deadline, "the server still holds the request");
      Thread.sleep(POLL_MS);
    }
  }
}
