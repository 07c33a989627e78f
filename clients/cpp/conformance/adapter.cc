// Conformance adapter: one call per line of standard input, one answer per line of standard output, both JSON.
// clients/conformance/README.md describes both.
#include <cxxabi.h>
#include <google/protobuf/util/json_util.h>

#include <cstdlib>
#include <fstream>
#include <iostream>
#include <iterator>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <typeinfo>
#include <utility>

#include "lda/client.h"

namespace {

using nlohmann::json;
namespace v1 = lda::v1;

// The call asks for something that cannot be done.
struct Unsupported : std::runtime_error {
  using std::runtime_error::runtime_error;
};

json ToJson(const google::protobuf::Message& message) {
  std::string text;
  const auto status = google::protobuf::util::MessageToJsonString(message, &text);
  if (!status.ok()) throw Unsupported(status.ToString());
  return json::parse(text);
}

template <typename Request>
Request RequestOf(const json& call) {
  Request request;
  const std::string text = call.value("request", json::object()).dump();
  const auto status = google::protobuf::util::JsonStringToMessage(text, &request);
  if (!status.ok()) throw Unsupported(status.ToString());
  return request;
}

lda::CallOptions OptionsOf(const json& call) {
  lda::CallOptions options;
  if (call.contains("timeoutMs")) options.timeout = std::chrono::milliseconds(call["timeoutMs"].get<int64_t>());
  return options;
}

std::string ReadFile(const std::string& path) {
  std::ifstream file(path);
  if (!file) throw Unsupported("cannot read " + path);
  return {std::istreambuf_iterator<char>(file), {}};
}

lda::Tls TlsOf(const json& paths) {
  lda::Tls tls;
  if (paths.contains("ca")) tls.ca_pem = ReadFile(paths["ca"]);
  if (paths.contains("certificate")) tls.certificate_pem = ReadFile(paths["certificate"]);
  if (paths.contains("key")) tls.key_pem = ReadFile(paths["key"]);
  return tls;
}

// One client, and so one channel, for each target and way to reach it; kept until the program ends.
const lda::Client& ClientOf(const json& call) {
  static auto& clients = *new std::map<std::string, std::unique_ptr<lda::Client>>;
  const std::string token = call.value("token", "");
  const json tls = call.value("tls", json());
  std::unique_ptr<lda::Client>& client = clients[json{call["target"], token, tls}.dump()];
  if (!client) {
    lda::Options options;
    options.token = token;
    if (!tls.is_null()) options.tls = TlsOf(tls);
    client = std::make_unique<lda::Client>(call["target"].get<std::string>(), options);
  }
  return *client;
}

// Fills in the events as they come, so that those before an error are kept.
template <typename Stream>
void RunStream(Stream stream, const json& call, json* answer) {
  json& events = (*answer)["events"];
  const size_t events_max = call.value("cancelAfter", SIZE_MAX);
  while (events.size() < events_max) {
    const auto event = stream.Next();
    if (!event) return;
    events.push_back(ToJson(*event));
  }
  (*answer)["ended"] = "cancelled";
}

// As proto3 JSON does it: the name, or the number of a value that only a newer server knows.
json EnumToJson(const std::string& name, int number) { return name.empty() ? json(number) : json(name); }

json SequenceToJson(const lda::Completion& sequence, const lda::Completions& whole) {
  json ids = json::array();
  for (const v1::Token& token : sequence.tokens) ids.push_back(token.id());
  const v1::Finished& finished = sequence.finished;
  return {{"sequenceIndex", finished.sequence_index()},
          {"role", EnumToJson(v1::ModelRole_Name(finished.role()), finished.role())},
          {"text", sequence.text},
          {"tokenIds", ids},
          {"reason", EnumToJson(v1::FinishReason_Name(finished.reason()), finished.reason())},
          {"stopString", finished.stop_string()},
          {"seed", std::to_string(whole.started.seed())}};
}

json SequencesToJson(const lda::Completions& whole) {
  json sequences = json::array();
  for (const lda::Completion& sequence : whole.sequences) sequences.push_back(SequenceToJson(sequence, whole));
  return sequences;
}

void RunVerb(const json& call, json* answer) {
  const lda::Client& client = ClientOf(call);
  const lda::CallOptions options = OptionsOf(call);
  const std::string verb = call.at("verb");
  if (verb == "generate") {
    RunStream(client.Generate(RequestOf<v1::GenerateLDARequest>(call), options), call, answer);
  } else if (verb == "generateBoth") {
    RunStream(client.GenerateBoth(RequestOf<v1::GenerateBothRequest>(call), options), call, answer);
  } else if (verb == "score") {
    RunStream(client.Score(RequestOf<v1::ScoreRequest>(call), options), call, answer);
  } else if (verb == "complete") {
    (*answer)["result"] = SequencesToJson(client.Complete(RequestOf<v1::GenerateLDARequest>(call), options));
  } else if (verb == "tokenizerCompat") {
    (*answer)["result"] = ToJson(client.TokenizerCompat(options));
  } else if (verb == "modelPair") {
    (*answer)["result"] = ToJson(client.ModelPair(options));
  } else {
    throw Unsupported("no verb " + verb);
  }
}

std::string ClassName(const lda::LdaClientError& error) {
  const std::unique_ptr<char, decltype(&std::free)> name(
      abi::__cxa_demangle(typeid(error).name(), nullptr, nullptr, nullptr), std::free);
  return std::string(name.get()).substr(sizeof("lda::") - 1);
}

json ErrorToJson(const lda::LdaClientError& error) {
  json violations = json::array();
  for (const auto& [field, description] : error.violations()) {
    violations.push_back({{"field", field}, {"description", description}});
  }
  const auto retry_after = error.retry_after();
  return {{"class", ClassName(error)},
          {"code", error.code() ? json(lda::CodeName(*error.code())) : json()},
          {"reason", error.reason() ? json(*error.reason()) : json()},
          {"message", error.what()},
          {"metadata", error.metadata()},
          {"violations", violations},
          {"retryAfterS", retry_after ? json(std::chrono::duration<double>(*retry_after).count()) : json()}};
}

json Answer(const json& call) {
  json answer = {
      {"id", call.at("id")}, {"ended", "ok"}, {"events", json::array()}, {"result", nullptr}, {"error", nullptr}};
  try {
    RunVerb(call, &answer);
  } catch (const lda::LdaClientError& error) {
    answer["ended"] = "error";
    answer["error"] = ErrorToJson(error);
  } catch (const std::exception& error) {
    return {{"id", call["id"]}, {"unsupported", error.what()}};
  }
  return answer;
}

}  // namespace

int main() {
  for (std::string line; std::getline(std::cin, line);) {
    std::cout << Answer(json::parse(line)).dump() << std::endl;
  }
}
