package lda.conformance;

import com.google.gson.Gson;
import com.google.gson.GsonBuilder;
import com.google.gson.JsonArray;
import com.google.gson.JsonElement;
import com.google.gson.JsonObject;
import com.google.gson.JsonParser;
import com.google.gson.JsonPrimitive;
import com.google.protobuf.InvalidProtocolBufferException;
import com.google.protobuf.Message;
import com.google.protobuf.MessageOrBuilder;
import com.google.protobuf.util.JsonFormat;
import java.io.BufferedReader;
import java.io.IOException;
import java.io.InputStreamReader;
import java.io.PrintStream;
import java.nio.charset.StandardCharsets;
import java.nio.file.Path;
import java.time.Duration;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import lda.client.Completion;
import lda.client.EventStream;
import lda.client.LdaClient;
import lda.client.LdaClientBuilder;
import lda.client.LdaClientError;
import lda.v1.GenerateBothRequest;
import lda.v1.GenerateLDARequest;
import lda.v1.ScoreRequest;

/** Runs the calls of the conformance cases through this client: a line of JSON in, a line of JSON out. */
public final class Adapter {
  private static final Gson GSON = new GsonBuilder().serializeNulls().disableHtmlEscaping().create();

  private final Map<String, LdaClient> clients = new HashMap<>();

  private Adapter() {}

  /** Answers every line of standard input. */
  public static void main(String[] arguments) throws IOException {
    var input = new BufferedReader(new InputStreamReader(System.in, StandardCharsets.UTF_8));
    var output = new PrintStream(System.out, true, StandardCharsets.UTF_8);
    var adapter = new Adapter();
    for (String line = input.readLine(); line != null; line = input.readLine()) {
      output.println(GSON.toJson(adapter.answer(JsonParser.parseString(line).getAsJsonObject())));
    }
    adapter.clients.values().forEach(LdaClient::close);
  }

  private JsonObject answer(JsonObject call) {
    var answer = new Answer(call.get("id"));
    try {
      run(call, answer);
    } catch (LdaClientError error) {
      answer.fail(error);
    } catch (InvalidProtocolBufferException | RuntimeException fault) {
      return answer.unsupported(fault.toString());
    }
    return answer.json();
  }

  private void run(JsonObject call, Answer answer) throws InvalidProtocolBufferException {
    LdaClient client = client(call);
    JsonObject request = call.has("request") ? call.getAsJsonObject("request") : new JsonObject();
    Duration timeout = call.has("timeoutMs") ? Duration.ofMillis(call.get("timeoutMs").getAsLong()) : null;
    Integer cancelAfter = call.has("cancelAfter") ? call.get("cancelAfter").getAsInt() : null;
    String verb = call.get("verb").getAsString();
    switch (verb) {
      case "generate" -> answer.read(client.generate(generateRequest(request), timeout), cancelAfter);
      case "generateBoth" -> answer.read(client.generateBoth(bothRequest(request), timeout), cancelAfter);
      case "score" -> answer.read(client.score(scoreRequest(request), timeout), cancelAfter);
      case "complete" -> answer.complete(client.complete(generateRequest(request), timeout));
      case "tokenizerCompat" -> answer.result = json(client.tokenizerCompat(timeout));
      case "modelPair" -> answer.result = json(client.modelPair(timeout));
      default -> throw new UnsupportedOperationException("There is no verb " + verb + ".");
    }
  }

  /** One client for each way to reach a server, kept open between calls. */
  private LdaClient client(JsonObject call) {
    String key = GSON.toJson(List.of(call.get("target"), orNull(call, "token"), orNull(call, "tls")));
    return clients.computeIfAbsent(key, absent -> connect(call));
  }

  private static LdaClient connect(JsonObject call) {
    LdaClientBuilder builder = LdaClient.builder().target(call.get("target").getAsString());
    if (call.has("token")) {
      builder.token(call.get("token").getAsString());
    }
    if (call.has("tls")) {
      addTls(builder, call.getAsJsonObject("tls"));
    }
    return builder.build();
  }

  private static void addTls(LdaClientBuilder builder, JsonObject tls) {
    builder.tls();
    if (tls.has("ca")) {
      builder.caCertificate(path(tls, "ca"));
    }
    if (tls.has("certificate")) {
      builder.clientCertificate(path(tls, "certificate"), path(tls, "key"));
    }
  }

  private static Path path(JsonObject tls, String name) {
    return Path.of(tls.get(name).getAsString());
  }

  private static String orNull(JsonObject call, String name) {
    return String.valueOf(call.get(name));
  }

  private static GenerateLDARequest generateRequest(JsonObject json) throws InvalidProtocolBufferException {
    return parse(json, GenerateLDARequest.newBuilder()).build();
  }

  private static GenerateBothRequest bothRequest(JsonObject json) throws InvalidProtocolBufferException {
    return parse(json, GenerateBothRequest.newBuilder()).build();
  }

  private static ScoreRequest scoreRequest(JsonObject json) throws InvalidProtocolBufferException {
    return parse(json, ScoreRequest.newBuilder()).build();
  }

  private static <B extends Message.Builder> B parse(JsonObject json, B builder) throws InvalidProtocolBufferException {
    JsonFormat.parser().merge(json.toString(), builder);
    return builder;
  }

  private static JsonElement json(MessageOrBuilder message) throws InvalidProtocolBufferException {
    return JsonParser.parseString(JsonFormat.printer().print(message));
  }

  /** What a call came to, as it is reported. */
  private static final class Answer {
    private final JsonElement id;
    private final JsonArray events = new JsonArray();
    private JsonElement result;
    private JsonObject error;
    private String ended = "ok";

    Answer(JsonElement id) {
      this.id = id;
    }

    void read(EventStream<? extends Message> stream, Integer cancelAfter) throws InvalidProtocolBufferException {
      try (stream) {
        for (Message event : stream) {
          events.add(Adapter.json(event));
          if (cancelAfter != null && events.size() >= cancelAfter) {
            ended = "cancelled";
            return;
          }
        }
      }
    }

    void complete(List<Completion> completions) {
      var list = new JsonArray();
      completions.forEach(each -> list.add(json(each)));
      result = list;
    }

    private static JsonObject json(Completion completion) {
      var json = new JsonObject();
      json.addProperty("sequenceIndex", completion.sequenceIndex());
      json.add("role", named(completion.role(), completion.finished().getRoleValue()));
      json.addProperty("text", completion.text());
      json.add("tokenIds", GSON.toJsonTree(completion.tokenIds()));
      json.add("reason", named(completion.reason(), completion.finished().getReasonValue()));
      json.addProperty("stopString", completion.finished().getStopString());
      json.addProperty("seed", Long.toUnsignedString(completion.started().getSeed()));
      return json;
    }

    /** Values that only a newer contract has a name for are numbers, as in proto3 JSON. */
    private static JsonPrimitive named(Enum<?> value, int number) {
      return value.name().equals("UNRECOGNIZED") ? new JsonPrimitive(number) : new JsonPrimitive(value.name());
    }

    void fail(LdaClientError failure) {
      ended = "error";
      error = new JsonObject();
      error.addProperty("class", failure.getClass().getSimpleName());
      error.addProperty("code", failure.code().map(Enum::name).orElse(null));
      error.addProperty("reason", failure.reason().orElse(null));
      error.addProperty("message", failure.getMessage());
      error.add("metadata", GSON.toJsonTree(failure.metadata()));
      error.add("violations", violations(failure));
      error.addProperty("retryAfterS", failure.retryAfter().map(each -> each.toMillis() / 1e3).orElse(null));
    }

    private static JsonArray violations(LdaClientError failure) {
      var list = new JsonArray();
      failure.violations().forEach(each -> {
        var json = new JsonObject();
        json.addProperty("field", each.field());
        json.addProperty("description", each.description());
        list.add(json);
      });
      return list;
    }

    JsonObject json() {
      var json = new JsonObject();
      json.add("id", id);
      json.addProperty("ended", ended);
      json.add("events", events);
      json.add("result", result);
      json.add("error", error);
      return json;
    }

    JsonObject unsupported(String why) {
      var json = new JsonObject();
      json.add("id", id);
      json.addProperty("unsupported", why);
      return json;
    }
  }
}
