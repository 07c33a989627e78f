package lda.client;

import lda.v1.Finished;
import lda.v1.TokenDelta;

/** Which sequence of a stream. The role is a number, since a newer server may send one that has no name here. */
record SequenceKey(int role, int index) {
  static SequenceKey of(TokenDelta delta) {
    return new SequenceKey(delta.getRoleValue(), delta.getSequenceIndex());
  }

  static SequenceKey of(Finished finished) {
    return new SequenceKey(finished.getRoleValue(), finished.getSequenceIndex());
  }
}
