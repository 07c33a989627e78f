// What the page does, as code that runs elsewhere.

import { toJson } from "@bufbuild/protobuf";
import { GenerateBothRequestSchema, GenerateLDARequestSchema } from "@lda/client";
import { amplifiedRequest, bothRequest, isPrefilled, rolloutsRequest } from "./requests";
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
  const { numSequences } = settings.view === "rollouts" ? rolloutsRequest(settings, 0) : amplifiedRequest(settings);
  const isText = settings.form === "text" && settings.fork?.via !== "ids";
  const isContinued =
    settings.form === "chat" && (settings.fork?.via === "text" || (!settings.fork && isPrefilled(settings)));
  return {
    raw: isText || undefined,
    continue_final_message: isContinued || undefined,
    num_sequences: numSequences,
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
  return settings.view === "rollouts" ? typescriptRollouts(settings, origin) : typescriptCompare(settings, origin);
}

const TS_IMPORTS = (schemas: string) => `\
import { fromJson } from "@bufbuild/protobuf";
import { connect, ${schemas} } from "@lda/client/node";
`;

function typescriptRollouts(settings: Settings, origin: string): string {
  const { alpha: _, ...request } = ldaJson(rolloutsRequest(settings, 0)) as Record<string, unknown>;
  return `${TS_IMPORTS("GenerateLDARequestSchema")}
const client = connect(${JSON.stringify(targetOf(origin))});
const request = ${jsObject(request)};
for (const alpha of ${JSON.stringify(settings.alphas)}) {
  for (const completion of await client.complete(fromJson(GenerateLDARequestSchema, { ...request, alpha }))) {
    console.log(alpha, completion.text);
  }
}
`;
}

function typescriptCompare(settings: Settings, origin: string): string {
  const both = toJson(GenerateBothRequestSchema, bothRequest(settings));
  return `${TS_IMPORTS("GenerateBothRequestSchema, GenerateLDARequestSchema, ModelRole")}
const client = connect(${JSON.stringify(targetOf(origin))});
const request = ${jsObject(both)};
const both = await client.generateBoth(fromJson(GenerateBothRequestSchema, request)).gather();
const amplified = await client.complete(fromJson(GenerateLDARequestSchema, { ...request, alpha: ${settings.alpha} }));
for (const completion of [...both, ...amplified]) {
  console.log(ModelRole[completion.role], completion.text);
}
`;
}

function jsObject(value: unknown): string {
  return JSON.stringify(value, null, 2);
}
