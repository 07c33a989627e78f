import java.util.List;
import lda.client.Completion;
import lda.client.LdaClient;
import lda.client.Prompts;
import lda.v1.FinishReason;
import lda.v1.GenerateLDARequest;
import lda.v1.Sampling;
import lda.v1.Stopping;

/** Two completions of a prompt. */
public final class Basic {
  private Basic() {}

  public static void main(String[] arguments) {
    try (LdaClient client = LdaClient.builder().target(Sample.target()).build()) {
      check(complete(client));
    }
    System.out.println("ok");
  }

  private static List<Completion> complete(LdaClient client) {
    // section:basic
    GenerateLDARequest request =
        GenerateLDARequest.newBuilder()
            .setPrompt(Prompts.chat(Prompts.turn("user", "Who are you?")))
            .setAlpha(0.5f)
            .setNumSequences(2)
            .setSampling(Sampling.newBuilder().setSeed(1))
            .setStopping(Stopping.newBuilder().setMaxNewTokens(48))
            .build();
    List<Completion> completions = client.complete(request);
    for (Completion each : completions) {
      System.out.println(each.sequenceIndex() + " " + each.reason() + " " + each.text());
    }
    // endsection:basic
    return completions;
  }

  private static void check(List<Completion> completions) {
    Sample.check(completions.size() == 2, "two sequences were asked for");
    for (Completion each : completions) {
      Sample.check(each.reason() != FinishReason.FINISH_REASON_UNSPECIFIED, "a sequence has not ended");
      Sample.check(!each.text().isEmpty(), "a sequence has no text");
    }
  }
}
