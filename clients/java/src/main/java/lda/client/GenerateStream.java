package lda.client;

import java.util.ArrayList;
import java.util.HashMap;
import java.util.Iterator;
import java.util.List;
import java.util.Map;
import java.util.Optional;
import java.util.function.Supplier;
import lda.v1.Finished;
import lda.v1.Started;
import lda.v1.Token;
import lda.v1.TokenDelta;

/**
 * The events of {@code generate} or {@code generateBoth}: {@code started}, deltas, and one {@code finished} for each
 * sequence.
 *
 * @param <E> {@link lda.v1.GenerateLDAResponse} or {@link lda.v1.GenerateBothResponse}
 */
public final class GenerateStream<E> extends EventStream<E> {
  private final GenerateGrammar<E> grammar;

  GenerateStream(Supplier<Iterator<E>> call, GenerateGrammar<E> grammar, String target) {
    super(call, grammar, target);
    this.grammar = grammar;
  }

  /** The first event: generation id, seed and alpha in force; empty until it has been read. */
  public Optional<Started> started() {
    return Optional.ofNullable(grammar.started());
  }

  /**
   * Reads the stream to its end. One completion for each sequence, in the order in which they finished.
   *
   * @throws IllegalStateException if events were already read from this stream
   * @throws LdaClientError if the call fails; {@link StreamBroken} if it was closed before its end
   */
  public List<Completion> gather() {
    if (isBegun()) {
      throw new IllegalStateException("gather() needs the whole stream, but events were already read from this one.");
    }
    Gathered gathered = new Gathered();
    forEachRemaining(event -> gathered.add(grammar.view(event)));
    grammar.end();
    return gathered.completions;
  }

  /** One sequence while it grows. */
  private record Draft(StringBuilder text, List<Token> tokens) {
    Draft() {
      this(new StringBuilder(), new ArrayList<>());
    }

    void add(TokenDelta delta) {
      text.append(delta.getText());
      tokens.addAll(delta.getTokensList());
    }

    Completion finish(Started started, Finished finished) {
      return new Completion(started, finished, text.toString(), List.copyOf(tokens));
    }
  }

  private final class Gathered {
    private final Map<SequenceKey, Draft> drafts = new HashMap<>();
    private final List<Completion> completions = new ArrayList<>();

    void add(GenerationEvent event) {
      if (event.delta() != null) {
        draft(SequenceKey.of(event.delta())).add(event.delta());
      } else if (event.finished() != null) {
        Draft draft = draft(SequenceKey.of(event.finished()));
        completions.add(draft.finish(grammar.started(), event.finished()));
      }
    }

    private Draft draft(SequenceKey key) {
      return drafts.computeIfAbsent(key, absent -> new Draft());
    }
  }
}
