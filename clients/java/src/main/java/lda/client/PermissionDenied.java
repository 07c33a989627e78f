package lda.client;

/** The token or certificate does not allow this method. Metadata: {@code scope}, where one is missing. */
public final class PermissionDenied extends AccessDenied {
  private static final long serialVersionUID = 1;

  PermissionDenied(ErrorFacts facts) {
    super(facts);
  }
}
