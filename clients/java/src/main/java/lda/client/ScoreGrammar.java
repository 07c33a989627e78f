package lda.client;

import static lda.client.Grammar.check;

import lda.v1.ScoreResponse;

/** Blocks without gaps, up to the total that each of them announces. */
final class ScoreGrammar implements Grammar<ScoreResponse> {
  private int scored;
  private int total;

  @Override
  public boolean isUnknown(ScoreResponse block) {
    return block.getTokensCount() == 0 && block.getTotalTokenCount() == 0;
  }

  @Override
  public void observe(ScoreResponse block) {
    check(block.getOffset() == scored, "a block begins at token %s, not at %s", block.getOffset(), scored);
    scored += block.getTokensCount();
    total = block.getTotalTokenCount();
    check(scored <= total, "it has more than %s tokens", total);
  }

  @Override
  public void end() {
    check(total > 0, "it ended before its first block");
    check(scored == total, "it ended when %s of %s tokens were scored", scored, total);
  }
}
