package lda.client;

import static lda.client.Grammar.check;

import java.util.HashSet;
import java.util.Set;
import java.util.function.Function;
import lda.v1.Started;

/** {@code started (delta)* finished{n}}; the sequences may come interleaved. */
final class GenerateGrammar<E> implements Grammar<E> {
  private final Function<E, GenerationEvent> view;
  private final int asked;
  private final Set<SequenceKey> running = new HashSet<>();
  private final Set<SequenceKey> finished = new HashSet<>();
  private Started started;

  /**
   * @param asked how many sequences the request is for, should the server not say how many it will send
   */
  GenerateGrammar(Function<E, GenerationEvent> view, int asked) {
    this.view = view;
    this.asked = asked;
  }

  /** The first event; null until it has arrived. */
  Started started() {
    return started;
  }

  GenerationEvent view(E event) {
    return view.apply(event);
  }

  @Override
  public boolean isUnknown(E event) {
    return view(event).isUnknown();
  }

  @Override
  public void observe(E event) {
    GenerationEvent seen = view(event);
    if (seen.started() != null) {
      check(started == null, "it sent `started` twice");
      started = seen.started();
    } else if (seen.delta() != null) {
      checkRunning(SequenceKey.of(seen.delta()));
    } else {
      SequenceKey key = SequenceKey.of(seen.finished());
      checkRunning(key);
      running.remove(key);
      finished.add(key);
    }
  }

  private void checkRunning(SequenceKey key) {
    check(started != null, "it did not begin with `started`");
    check(!finished.contains(key), "sequence %s went on after it had finished", key.index());
    check(key.index() >= 0 && key.index() < expected(), "it has no sequence %s", key.index());
    running.add(key);
    check(running.size() + finished.size() <= expected(), "it has more than %s sequences", expected());
  }

  @Override
  public void end() {
    check(started != null, "it ended before `started`");
    check(
        finished.size() == expected(),
        "it ended when %s of %s sequences had finished",
        finished.size(),
        expected());
  }

  private int expected() {
    return started.getSequenceCount() == 0 ? asked : started.getSequenceCount();
  }
}
