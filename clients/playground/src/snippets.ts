// What the page does, as code that runs elsewhere.

import { toJson } from "@bufbuild/protobuf";
import { GenerateBothRequestSchema, GenerateLDARequestSchema } from "@lda/client";
import { amplifiedRequest, bothRequest, rolloutsRequest } from "./requests";
import type { Settings } from "./settings";

export type Language = "curl" | "python" | "typescript";

/** Code that asks the server at this address (`http://host:port`) for what the view shows. */
export function snippet(language: Language, settings: Settings, origin: string): string {
  const writers = { curl, python, typescript };
  return writers[language](settings, origin);
}

function curl(settings: Settings, origin: string): string {
  const ask = (path: string, body: unknown) => `curl -N ${origin}${path} -d ${shellQuoted(JSON.stringify(body))}\n`;
  const lda = (request: Parameters<typeof ldaJson>[0]) => ask("/v1:generateLda", ldaJson(request));
  if (settings.view === "rollouts") {
    return settings.alphas.map((alpha) => lda(rolloutsRequest(settings, alpha))).join("");
  }
  const both = toJson(GenerateBothRequestSchema, bothRequest(settings));
  return ask("/v1:generateBoth", both) + lda(amplifiedRequest(settings));
}

function ldaJson(request: ReturnType<typeof amplifiedRequest>) {
  return toJson(GenerateLDARequestSchema, request);
}

/** One word to a POSIX shell. */
export function shellQuoted(text: string): string {
  return `'${text.replaceAll("'", `'\\''`)}'`;
}

function python(settings: Settings, origin: string): string {
  const body = settings.view === "rollouts" ? PYTHON_ROLLOUTS(settings) : PYTHON_COMPARE(settings);
  const imports = settings.view === "rollouts" ? "LdaClient" : "LdaClient, pb";
  return (
    `from lda_client import ${imports}\n\n` +
    `PROMPT = ${pythonLiteral(pythonPrompt(settings))}\n` +
    `OPTIONS = ${pythonDict(pythonOptions(settings))}\n\n` +
    `with LdaClient(${pythonLiteral(targetOf(origin))}) as client:\n${body}`
  );
}

const PYTHON_ROLLOUTS = (settings: Settings) => `\
    for alpha in ${pythonLiteral(settings.alphas)}:
        for completion in client.complete(PROMPT, alpha=alpha, **OPTIONS):
            print(alpha, repr(completion.text))
`;

const PYTHON_COMPARE = (settings: Settings) => `\
    with client.generate_both(PROMPT, **OPTIONS) as stream:
        both = stream.gather()
    amplified = client.complete(PROMPT, alpha=${pythonLiteral(settings.alpha)}, **OPTIONS)
before, after = both.of_role(pb.MODEL_ROLE_BEFORE), both.of_role(pb.MODEL_ROLE_AFTER)
for title, completions in (("before", before), ("after", after), ("amplified", amplified)):
    for completion in completions:
        print(f"{title}: {completion.text}")
`;

function pythonPrompt(settings: Settings): unknown {
  const { form } = amplifiedRequest(settings).prompt!;
  if (form.case === "chat") return form.value.messages.map(({ role, content }) => ({ role, content }));
  return form.case === "tokens" ? form.value.ids : form.value;
}

/** Keyword arguments in the Python client's names; what is undefined is left out. */
function pythonOptions(settings: Settings): Record<string, unknown> {
  const { form } = amplifiedRequest(settings).prompt!;
  return {
    raw: form.case === "text" || undefined,
    continue_final_message: (form.case === "chat" && form.value.continueFinalMessage) || undefined,
    num_sequences: sequencesOf(settings),
    seed: BigInt(settings.seed),
    temperature: settings.temperature,
    top_p: settings.topP,
    top_k: settings.topK,
    min_p: settings.minP,
    plausibility: settings.plausibility,
    max_new_tokens: settings.maxNewTokens,
    stop: settings.stop.length > 0 ? settings.stop : undefined,
  };
}

function pythonDict(values: Record<string, unknown>): string {
  const lines = Object.entries(values).filter(([, value]) => value !== undefined);
  return `{\n${lines.map(([key, value]) => `    "${key}": ${pythonLiteral(value)},\n`).join("")}}`;
}

/** A value as Python writes it. JSON's strings are Python's, but for half characters, which prompts never hold. */
export function pythonLiteral(value: unknown): string {
  if (typeof value === "boolean") return value ? "True" : "False";
  if (typeof value === "bigint" || typeof value === "number") return String(value);
  if (typeof value === "string") return JSON.stringify(value).replaceAll("\u007f", "\\u007f");
  if (Array.isArray(value)) return `[${value.map(pythonLiteral).join(", ")}]`;
  const entries = Object.entries(value as object).map(
    ([key, each]) => `${JSON.stringify(key)}: ${pythonLiteral(each)}`,
  );
  return `{${entries.join(", ")}}`;
}

/** What a gRPC client calls the address. */
function targetOf(origin: string): string {
  const { hostname, port, protocol } = new URL(origin);
  return `${hostname}:${port || (protocol === "https:" ? 443 : 80)}`;
}

function typescript(settings: Settings, origin: string): string {
  const isRollouts = settings.view === "rollouts";
  const { name, call } = typescriptPrompt(settings);
  return `import { ${isRollouts ? name : `${name}, ModelRole`} } from "@lda/client";
import { connectNode } from "@lda/client/node";

const client = connectNode(${JSON.stringify(targetOf(origin))});
const request = {
  prompt: ${call},
${typescriptOptions(settings)}};
${isRollouts ? TS_ROLLOUTS(settings) : TS_COMPARE(settings)}client.close();
`;
}

const TS_ROLLOUTS = (settings: Settings) => `\
for (const alpha of ${JSON.stringify(settings.alphas)}) {
  for (const completion of await client.complete({ ...request, alpha })) {
    console.log(alpha, completion.text);
  }
}
`;

const TS_COMPARE = (settings: Settings) => `\
const both = await client.generateBoth(request).gather();
const amplified = await client.complete({ ...request, alpha: ${settings.alpha} });
for (const completion of [...both, ...amplified]) {
  console.log(ModelRole[completion.role], completion.text);
}
`;

function typescriptPrompt(settings: Settings): { name: string; call: string } {
  const { form } = amplifiedRequest(settings).prompt!;
  if (form.case === "tokens") return { name: "tokens", call: `tokens(${JSON.stringify(form.value.ids)})` };
  if (form.case !== "chat") return { name: "text", call: `text(${JSON.stringify(form.value)})` };
  const turns = form.value.messages.map(({ role, content }) => ({ role, content }));
  const options = form.value.continueFinalMessage ? ", { continueFinalMessage: true }" : "";
  return { name: "chat", call: `chat(${JSON.stringify(turns)}${options})` };
}

function typescriptOptions(settings: Settings): string {
  const { temperature, topP, topK, minP, plausibility, maxNewTokens, stop } = settings;
  const sampling = { temperature, topP, topK, minP, plausibility };
  const stopping = { maxNewTokens, stopStrings: stop.length > 0 ? stop : undefined };
  const seed = `seed: ${settings.seed}n`;
  return (
    `  numSequences: ${sequencesOf(settings)},\n` +
    `  sampling: { ${[...members(sampling), seed].join(", ")} },\n` +
    `  stopping: { ${members(stopping).join(", ")} },\n`
  );
}

function members(values: object): string[] {
  const known = Object.entries(values).filter(([, value]) => value !== undefined);
  return known.map(([name, value]) => `${name}: ${JSON.stringify(value)}`);
}

function sequencesOf(settings: Settings): number {
  const request = settings.view === "rollouts" ? rolloutsRequest(settings, 0) : amplifiedRequest(settings);
  return request.numSequences!;
}
