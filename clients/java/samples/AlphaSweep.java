import lda.client.Completion;
import lda.client.GenerateStream;
import lda.client.LdaClient;
import lda.client.Prompts;
import lda.v1.GenerateBothRequest;
import lda.v1.GenerateBothResponse;
import lda.v1.GenerateLDARequest;
import lda.v1.ModelRole;
import lda.v1.OutputOptions;
import lda.v1.Prompt;
import lda.v1.Sampling;
import lda.v1.Stopping;

/** One prompt and one seed at several alphas; alpha 0 is the after model itself. */
public final class AlphaSweep {
  private static final Prompt PROMPT = Prompts.chat(Prompts.turn("user", "Who are you?"));
  private static final Sampling GREEDY = Sampling.newBuilder().setTemperature(0).setSeed(1).build();
  private static final Stopping SHORT = Stopping.newBuilder().setMaxNewTokens(32).build();

  private AlphaSweep() {}

  public static void main(String[] arguments) {
    try (LdaClient client = LdaClient.builder().target(Sample.target()).build()) {
      sweep(client);
      String unamplified = at(client, 0).text();
      String after = after(client);
      Sample.check(unamplified.equals(after), "alpha 0 gave " + unamplified + " but after gave " + after);
    }
    System.out.println("ok");
  }

  private static void sweep(LdaClient client) {
    // section:alpha_sweep
    for (float alpha : new float[] {0, 0.5f, 1}) {
      Completion drawn = at(client, alpha);
      double meanKl =
          drawn.tokens().stream().mapToDouble(token -> token.getDiagnostics().getAfterBeforeKl()).average().orElse(0);
      System.out.printf("alpha %.1f, mean KL %.3f: %s%n", alpha, meanKl, drawn.text());
    }
    // endsection:alpha_sweep
  }

  // section:at
  private static Completion at(LdaClient client, float alpha) {
    GenerateLDARequest request =
        GenerateLDARequest.newBuilder()
            .setPrompt(PROMPT)
            .setAlpha(alpha)
            .setSampling(GREEDY)
            .setStopping(SHORT)
            .setOutput(OutputOptions.newBuilder().setDiagnostics(true))
            .build();
    return client.complete(request).get(0);
  }

  // endsection:at

  private static String after(LdaClient client) {
    // section:both
    GenerateBothRequest request =
        GenerateBothRequest.newBuilder().setPrompt(PROMPT).setSampling(GREEDY).setStopping(SHORT).build();
    try (GenerateStream<GenerateBothResponse> stream = client.generateBoth(request)) {
      for (Completion each : stream.gather()) {
        if (each.role() == ModelRole.MODEL_ROLE_AFTER) {
          return each.text();
        }
      }
    }
    // endsection:both
    throw new AssertionError("the after model drew nothing");
  }
}
