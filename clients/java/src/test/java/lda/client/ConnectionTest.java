package lda.client;

import static lda.client.ScriptedServer.delta;
import static lda.client.ScriptedServer.finished;
import static lda.client.ScriptedServer.started;
import static org.junit.Assert.assertEquals;
import static org.junit.Assert.assertThrows;
import static org.junit.Assert.assertTrue;

import io.grpc.TlsServerCredentials;
import java.io.IOException;
import java.net.InetAddress;
import java.net.ServerSocket;
import java.nio.file.Files;
import java.nio.file.Path;
import java.time.Duration;
import java.util.List;
import lda.v1.ChatMessage;
import lda.v1.GenerateLDARequest;
import lda.v1.Prompt;
import org.junit.BeforeClass;
import org.junit.ClassRule;
import org.junit.Test;
import org.junit.rules.TemporaryFolder;

public class ConnectionTest {
  @ClassRule public static final TemporaryFolder FOLDER = new TemporaryFolder();

  private static final GenerateLDARequest REQUEST = GenerateLDARequest.getDefaultInstance();
  private static final Duration SHORT = Duration.ofMillis(200);

  private static Identity server;
  private static Identity caller;

  @BeforeClass
  public static void certificates() throws Exception {
    Path folder = FOLDER.getRoot().toPath();
    server = Identity.create(folder, "lda.test");
    caller = Identity.create(folder, "caller.test");
  }

  /** A token is sent as a bearer token with every call, on a plain connection too; without one there is no header. */
  @Test
  public void tokenOnPlaintext() throws Exception {
    try (var scripted = new ScriptedServer();
        var client = LdaClient.builder().target(scripted.target()).token("secret").build();
        var anonymous = scripted.client()) {
      scripted.play(started(1), finished(0));
      client.modelPair();
      client.complete(REQUEST);
      anonymous.modelPair();
      assertEquals("Bearer secret", scripted.authorizations.take());
      assertEquals("Bearer secret", scripted.authorizations.take());
      assertEquals("none", scripted.authorizations.take());
    }
  }

  /** Over TLS the server must carry the expected name, under an authority that is trusted. */
  @Test
  public void tls() throws Exception {
    var credentials = TlsServerCredentials.create(server.certificate().toFile(), server.key().toFile());
    try (var scripted = new ScriptedServer(credentials)) {
      LdaClientBuilder options = LdaClient.builder().target(scripted.target()).caCertificate(server.certificate());
      try (var unnamed = options.build();
          var named = options.serverName("lda.test").build();
          var strangers = options.caCertificate(caller.certificate()).build()) {
        assertEquals("scripted", named.modelPair().getServerVersion());
        assertThrows(ServerAway.class, unnamed::modelPair);
        assertThrows(ServerAway.class, strangers::modelPair);
      }
    }
  }

  /** A server that wants a client certificate gets it, and serves nobody without. */
  @Test
  public void mutualTls() throws Exception {
    var credentials =
        TlsServerCredentials.newBuilder()
            .keyManager(server.certificate().toFile(), server.key().toFile())
            .trustManager(caller.certificate().toFile())
            .clientAuth(TlsServerCredentials.ClientAuth.REQUIRE)
            .build();
    try (var scripted = new ScriptedServer(credentials)) {
      LdaClientBuilder options =
          LdaClient.builder().target(scripted.target()).caCertificate(server.certificate()).serverName("lda.test");
      try (var anonymous = options.build();
          var known = options.clientCertificate(caller.certificate(), caller.key()).build()) {
        assertEquals("scripted", known.modelPair().getServerVersion());
        assertThrows(ServerAway.class, anonymous::modelPair);
      }
    }
  }

  /** Files that are missing, or hold no key, are named when the client is made. */
  @Test
  public void unreadableFiles() throws Exception {
    var missing = LdaClient.builder().caCertificate(Path.of("missing.pem"));
    assertTrue(assertThrows(IllegalArgumentException.class, missing::build).getMessage().contains("missing.pem"));
    Path empty = Files.createFile(FOLDER.getRoot().toPath().resolve("empty.pem"));
    var keyless = LdaClient.builder().clientCertificate(caller.certificate(), empty);
    assertThrows(IllegalArgumentException.class, keyless::build);
  }

  /** A timeout ends a stream and a short call with DeadlineExceeded; that of a call goes before that of the client. */
  @Test
  public void timeouts() throws Exception {
    try (var scripted = new ScriptedServer();
        var client = LdaClient.builder().target(scripted.target()).totalTimeout(SHORT).build();
        var patient = scripted.client()) {
      assertThrows(DeadlineExceeded.class, () -> client.complete(REQUEST));
      assertThrows(DeadlineExceeded.class, () -> patient.complete(REQUEST, SHORT));
      assertThrows(DeadlineExceeded.class, () -> patient.modelPair(Duration.ofNanos(1)));
      assertThrows(IllegalArgumentException.class, () -> patient.modelPair(Duration.ZERO));
      assertThrows(IllegalArgumentException.class, () -> LdaClient.builder().totalTimeout(Duration.ofSeconds(-1)));
    }
  }

  /** Nobody at the target is ServerAway and names the target, at once or after the connect timeout. */
  @Test
  public void nobodyThere() throws Exception {
    String target = "127.0.0.1:" + freePort();
    try (var client = LdaClient.builder().target(target).build();
        var waiting = LdaClient.builder().target(target).connectTimeout(SHORT).build()) {
      assertTrue(assertThrows(ServerAway.class, client::modelPair).getMessage().contains(target));
      var late = assertThrows(ServerAway.class, waiting::modelPair);
      assertTrue(late.getMessage(), late.getMessage().contains("no connection within 0.2 s"));
    }
  }

  /** A connect timeout does not get in the way of a server that is there. */
  @Test
  public void connectTimeout() throws Exception {
    try (var scripted = new ScriptedServer();
        var client =
            LdaClient.builder().target(scripted.target()).connectTimeout(Duration.ofSeconds(10)).build()) {
      assertEquals("scripted", client.modelPair().getServerVersion());
    }
  }

  /** Messages of 19 MiB are read; one above 20 MiB is refused. */
  @Test
  public void messageSizes() throws Exception {
    try (var scripted = new ScriptedServer();
        var client = scripted.client()) {
      scripted.play(started(1), delta(0, "w".repeat(19 << 20)), finished(0));
      assertEquals(19 << 20, client.complete(REQUEST).get(0).text().length());
      scripted.play(started(1), delta(0, "w".repeat(20 << 20)), finished(0));
      assertThrows(Exhausted.class, () -> client.complete(REQUEST));
    }
  }

  /** The helpers make the three forms of a prompt. */
  @Test
  public void prompts() {
    assertEquals(Prompt.FormCase.TEXT, Prompts.text("hi").getFormCase());
    ChatMessage turn = Prompts.chat(Prompts.turn("user", "hi")).getChat().getMessages(0);
    assertEquals("user: hi", turn.getRole() + ": " + turn.getContent());
    assertEquals(List.of(1, 2), Prompts.tokens(1, 2).getTokens().getIdsList());
  }

  private static int freePort() throws IOException {
    try (var socket = new ServerSocket(0, 1, InetAddress.getLoopbackAddress())) {
      return socket.getLocalPort();
    }
  }
}
