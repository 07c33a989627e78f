package lda.client;

import lda.v1.Finished;
import lda.v1.GenerateBothResponse;
import lda.v1.GenerateLDAResponse;
import lda.v1.Started;
import lda.v1.TokenDelta;

/** The events of both generating verbs in one shape. All are null in an event that only a newer contract knows. */
record GenerationEvent(Started started, TokenDelta delta, Finished finished) {
  static GenerationEvent of(GenerateLDAResponse event) {
    return new GenerationEvent(
        event.hasStarted() ? event.getStarted() : null,
        event.hasDelta() ? event.getDelta() : null,
        event.hasFinished() ? event.getFinished() : null);
  }

  static GenerationEvent of(GenerateBothResponse event) {
    return new GenerationEvent(
        event.hasStarted() ? event.getStarted() : null,
        event.hasDelta() ? event.getDelta() : null,
        event.hasFinished() ? event.getFinished() : null);
  }

  boolean isUnknown() {
    return started == null && delta == null && finished == null;
  }
}
