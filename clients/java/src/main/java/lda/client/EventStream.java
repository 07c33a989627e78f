package lda.client;

import io.grpc.Context;
import io.grpc.StatusRuntimeException;
import java.util.Iterator;
import java.util.NoSuchElementException;
import java.util.function.Supplier;

/**
 * The events of one call, which is under way. One thread reads; any thread may {@link #close()}.
 *
 * <p>Leaving early cancels the call on the server, which frees its place at the next decoding step. Java drops a stream
 * silently when a bare loop is left, so put it in a try-with-resources:
 *
 * <pre>{@code
 * try (var stream = client.generate(request)) {
 *   for (var event : stream) { ... }
 * }
 * }</pre>
 *
 * <p>An interrupt of the reading thread cancels the call too, and so does the {@link Context} in which it began; both
 * raise {@link Aborted}. Iteration throws an {@link LdaClientError} if the call fails. No more than a few events are
 * held in memory: a reader that falls behind holds up the server.
 *
 * @param <E> the message of the contract
 */
public abstract class EventStream<E> implements Iterator<E>, Iterable<E>, AutoCloseable {
  private final Context.CancellableContext context = Context.current().withCancellation();
  private final Iterator<E> events;
  private final Grammar<E> grammar;
  private final String target;
  private E next;
  private boolean answered;
  private volatile boolean ended;
  private volatile boolean cancelled;

  EventStream(Supplier<Iterator<E>> call, Grammar<E> grammar, String target) {
    this.grammar = grammar;
    this.target = target;
    Context previous = context.attach();
    try {
      events = call.get();
    } finally {
      context.detach(previous);
    }
  }

  /** Waits for the next event. Throws {@link LdaClientError} if the call fails. */
  @Override
  public boolean hasNext() {
    if (next == null && !ended) {
      next = fetch();
    }
    return next != null;
  }

  /** The next event, as {@link #hasNext()}. */
  @Override
  public E next() {
    if (!hasNext()) {
      throw new NoSuchElementException("The stream has ended.");
    }
    E event = next;
    next = null;
    return event;
  }

  /** This stream: it can be read once. */
  @Override
  public Iterator<E> iterator() {
    return this;
  }

  /** Cancels the call on the server if it is still under way; iteration then ends. May be called twice. */
  @Override
  public void close() {
    if (!ended) {
      cancelled = true;
      end();
    }
  }

  /** Whether the stream was closed before its end. */
  public boolean isCancelled() {
    return cancelled;
  }

  /** Whether any event was read. */
  boolean isBegun() {
    return answered;
  }

  private E fetch() {
    try {
      E event = nextKnown();
      if (event == null) {
        end();
      }
      return event;
    } catch (StatusRuntimeException error) {
      if (cancelled) {
        return null;
      }
      end();
      throw Errors.of(error, target, answered);
    } catch (StreamBroken error) {
      end();
      throw error;
    }
  }

  private E nextKnown() {
    while (events.hasNext()) {
      E event = events.next();
      answered = true;
      if (!grammar.isUnknown(event)) {
        grammar.observe(event);
        return event;
      }
    }
    grammar.end();
    return null;
  }

  private void end() {
    ended = true;
    context.cancel(null);
  }
}
