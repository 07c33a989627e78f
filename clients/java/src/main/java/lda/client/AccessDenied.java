package lda.client;

/** The bearer token or client certificate is missing, wrong, or without the right to this call. */
public class AccessDenied extends RequestRejected {
  private static final long serialVersionUID = 1;

  AccessDenied(ErrorFacts facts) {
    super(facts);
  }
}
