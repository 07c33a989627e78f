package lda.client;

import io.grpc.ChannelCredentials;
import io.grpc.Grpc;
import io.grpc.InsecureChannelCredentials;
import io.grpc.ManagedChannel;
import io.grpc.ManagedChannelBuilder;
import io.grpc.TlsChannelCredentials;
import java.io.IOException;
import java.nio.file.Path;
import java.time.Duration;
import java.util.List;
import java.util.Map;
import java.util.Objects;
import java.util.concurrent.TimeUnit;

/** What a client is told about its server. Made by {@link LdaClient#builder()}. */
public final class LdaClientBuilder {
  /** Where a server listens unless told otherwise. */
  public static final String DEFAULT_TARGET = "127.0.0.1:50051";

  static final int MESSAGE_BYTES_MAX = 20 << 20;
  private static final long KEEPALIVE_S = 30;
  private static final long KEEPALIVE_TIMEOUT_S = 10;

  // Only UNAVAILABLE: the server sends it before any work was done. gRPC never retries once an answer has begun.
  private static final Map<String, ?> SERVICE_CONFIG =
      Map.of(
          "methodConfig",
          List.of(
              Map.of(
                  "name", List.of(Map.of("service", "lda.v1.LdaService")),
                  "retryPolicy",
                      Map.of(
                          "maxAttempts", 4.0,
                          "initialBackoff", "0.1s",
                          "maxBackoff", "1s",
                          "backoffMultiplier", 2.0,
                          "retryableStatusCodes", List.of("UNAVAILABLE")))));

  String target = DEFAULT_TARGET;
  String token;
  Duration connectTimeout;
  Duration totalTimeout;
  Duration lookupTimeout = Duration.ofSeconds(30);
  private boolean isTls;
  private Path caCertificate;
  private Path clientCertificate;
  private Path clientKey;
  private String serverName;

  LdaClientBuilder() {}

  /** Address of the server, {@code host:port} or any gRPC target. */
  public LdaClientBuilder target(String target) {
    this.target = Objects.requireNonNull(target);
    return this;
  }

  /** Bearer token, sent with every call. Without TLS it crosses the network readable. */
  public LdaClientBuilder token(String token) {
    this.token = token;
    return this;
  }

  /** Speak TLS, and trust the authorities that Java trusts unless {@link #caCertificate} names one. */
  public LdaClientBuilder tls() {
    isTls = true;
    return this;
  }

  /** Speak TLS, and trust the servers of this authority: a PEM file. */
  public LdaClientBuilder caCertificate(Path certificate) {
    caCertificate = Objects.requireNonNull(certificate);
    return tls();
  }

  /** Speak TLS, and show this certificate: PEM files, the key in PKCS #8 ({@code openssl pkcs8 -topk8 -nocrypt}). */
  public LdaClientBuilder clientCertificate(Path certificate, Path key) {
    clientCertificate = Objects.requireNonNull(certificate);
    clientKey = Objects.requireNonNull(key);
    return tls();
  }

  /** The name that the certificate of the server must carry, if it is not that of the target. */
  public LdaClientBuilder serverName(String serverName) {
    this.serverName = serverName;
    return this;
  }

  /** How long a call waits for a server that is not there yet; unset, it is reported at once. */
  public LdaClientBuilder connectTimeout(Duration timeout) {
    connectTimeout = positive(timeout);
    return this;
  }

  /** Timeout of {@code generate}, {@code generateBoth}, {@code score} and {@code complete}; unset, there is none. */
  public LdaClientBuilder totalTimeout(Duration timeout) {
    totalTimeout = positive(timeout);
    return this;
  }

  /** Timeout of the short calls; 30 seconds unless set. */
  public LdaClientBuilder lookupTimeout(Duration timeout) {
    lookupTimeout = positive(timeout);
    return this;
  }

  /**
   * The client. It connects at its first call.
   *
   * @throws IllegalArgumentException if the target, a certificate or the key cannot be read
   * @throws IllegalStateException if TLS is asked for and the netty of this program cannot speak it
   */
  public LdaClient build() {
    return new LdaClient(channel(), this);
  }

  private ManagedChannel channel() {
    ManagedChannelBuilder<?> builder = channelBuilder(isTls ? tlsCredentials() : InsecureChannelCredentials.create());
    if (serverName != null) {
      builder.overrideAuthority(serverName);
    }
    return builder
        .userAgent("lda-client-java")
        .defaultLoadBalancingPolicy("round_robin")
        .defaultServiceConfig(SERVICE_CONFIG)
        .enableRetry()
        // A request that is kept for another attempt may be as large as any.
        .perRpcBufferLimit(MESSAGE_BYTES_MAX)
        .maxInboundMessageSize(MESSAGE_BYTES_MAX)
        // Pings while a call is open, so that a dead peer is noticed during a long silent prefill.
        .keepAliveTime(KEEPALIVE_S, TimeUnit.SECONDS)
        .keepAliveTimeout(KEEPALIVE_TIMEOUT_S, TimeUnit.SECONDS)
        .build();
  }

  private ManagedChannelBuilder<?> channelBuilder(ChannelCredentials credentials) {
    try {
      return Grpc.newChannelBuilder(target, credentials);
    } catch (UnsupportedOperationException missing) {
      String remedy = "on Debian install libnetty-tcnative-java and take the class path of build/classpath";
      throw new IllegalStateException("This netty cannot speak HTTP/2 over TLS: " + remedy + ".", missing);
    }
  }

  private ChannelCredentials tlsCredentials() {
    TlsChannelCredentials.Builder tls = TlsChannelCredentials.newBuilder();
    try {
      if (caCertificate != null) {
        tls.trustManager(caCertificate.toFile());
      }
      if (clientCertificate != null) {
        tls.keyManager(clientCertificate.toFile(), clientKey.toFile());
      }
    } catch (IOException error) {
      throw new IllegalArgumentException("A certificate or key cannot be read: " + error.getMessage(), error);
    }
    return tls.build();
  }

  static Duration positive(Duration timeout) {
    if (timeout.isNegative() || timeout.isZero()) {
      throw new IllegalArgumentException("A timeout is " + timeout + "; give a positive one.");
    }
    return timeout;
  }
}
