package lda.client;

import java.util.Iterator;
import java.util.function.Supplier;
import lda.v1.ScoreResponse;

/** The blocks of {@code score}, which follow on one another. */
public final class ScoreStream extends EventStream<ScoreResponse> {
  ScoreStream(Supplier<Iterator<ScoreResponse>> call, String target) {
    super(call, new ScoreGrammar(), target);
  }
}
