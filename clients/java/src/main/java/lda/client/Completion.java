package lda.client;

import java.util.List;
import lda.v1.FinishReason;
import lda.v1.Finished;
import lda.v1.ModelRole;
import lda.v1.Started;
import lda.v1.Token;

/**
 * One finished sequence.
 *
 * @param started the first event of its stream: generation id, seed and alpha in force
 * @param finished its last event: why it ended, what it cost, its alpha scores
 * @param text its text, without the stop string
 * @param tokens its tokens, with log-probabilities and diagnostics as asked for
 */
public record Completion(Started started, Finished finished, String text, List<Token> tokens) {
  /** Which sequence; counts from 0, for each role on its own. */
  public int sequenceIndex() {
    return finished.getSequenceIndex();
  }

  /** Which distribution drew it. */
  public ModelRole role() {
    return finished.getRole();
  }

  /** Why it ended. */
  public FinishReason reason() {
    return finished.getReason();
  }

  /** The ids of its tokens. */
  public List<Integer> tokenIds() {
    return tokens.stream().map(Token::getId).toList();
  }
}
