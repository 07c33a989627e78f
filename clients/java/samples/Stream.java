import lda.client.GenerateStream;
import lda.client.LdaClient;
import lda.client.Prompts;
import lda.v1.GenerateLDARequest;
import lda.v1.GenerateLDAResponse;
import lda.v1.Sampling;
import lda.v1.Stopping;

/** Text as it arrives, which adds up to what `complete` gives for the same seed. */
public final class Stream {
  private Stream() {}

  public static void main(String[] arguments) {
    GenerateLDARequest request =
        GenerateLDARequest.newBuilder()
            .setPrompt(Prompts.chat(Prompts.turn("user", "Who are you?")))
            .setAlpha(0.5f)
            .setSampling(Sampling.newBuilder().setSeed(7))
            .setStopping(Stopping.newBuilder().setMaxNewTokens(48))
            .build();
    try (LdaClient client = LdaClient.builder().target(Sample.target()).build()) {
      String streamed = stream(client, request);
      String gathered = client.complete(request).get(0).text();
      Sample.check(streamed.equals(gathered), "streamed " + streamed + " but gathered " + gathered);
    }
    System.out.println("ok");
  }

  private static String stream(LdaClient client, GenerateLDARequest request) {
    StringBuilder streamed = new StringBuilder();
    // section:stream
    try (GenerateStream<GenerateLDAResponse> stream = client.generate(request)) {
      for (GenerateLDAResponse event : stream) {
        String text = event.getDelta().getText();
        System.out.print(text);
        System.out.flush();
        streamed.append(text);
      }
    }
    System.out.println();
    // endsection:stream
    return streamed.toString();
  }
}
