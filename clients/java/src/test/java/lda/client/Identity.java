package lda.client;

import java.io.IOException;
import java.io.InputStream;
import java.nio.file.Files;
import java.nio.file.Path;
import java.security.GeneralSecurityException;
import java.security.KeyStore;
import java.util.Base64;
import java.util.List;

/** A self-signed certificate and its key, as PEM files of a folder. */
record Identity(Path certificate, Path key) {
  private static final String PASSWORD = "password";

  static Identity create(Path folder, String name) throws IOException, InterruptedException, GeneralSecurityException {
    Path store = folder.resolve(name + ".p12");
    List<String> command =
        List.of(
            Path.of(System.getProperty("java.home"), "bin", "keytool").toString(),
            "-genkeypair", "-alias", name, "-keyalg", "EC", "-groupname", "secp256r1", "-dname", "CN=" + name,
            "-ext", "san=dns:" + name, "-validity", "2", "-keystore", store.toString(), "-storepass", PASSWORD);
    Process keytool = new ProcessBuilder(command).redirectErrorStream(true).start();
    String said = new String(keytool.getInputStream().readAllBytes());
    if (keytool.waitFor() != 0) {
      throw new IOException(said);
    }
    return read(store, name);
  }

  private static Identity read(Path store, String name) throws IOException, GeneralSecurityException {
    KeyStore keys = KeyStore.getInstance("PKCS12");
    try (InputStream input = Files.newInputStream(store)) {
      keys.load(input, PASSWORD.toCharArray());
    }
    return new Identity(
        pem(store, "CERTIFICATE", keys.getCertificate(name).getEncoded()),
        pem(store, "PRIVATE KEY", keys.getKey(name, PASSWORD.toCharArray()).getEncoded()));
  }

  private static Path pem(Path store, String label, byte[] content) throws IOException {
    String body = Base64.getMimeEncoder().encodeToString(content);
    Path file = Path.of(store + "." + label.replace(' ', '.').toLowerCase() + ".pem");
    return Files.writeString(file, "-----BEGIN %s-----%n%s%n-----END %s-----%n".formatted(label, body, label));
  }
}
