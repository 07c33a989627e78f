// Generate the code of the contract into src/gen, or check that what is committed is fresh.
//
//     node scripts/generate.mjs            write src/gen
//     node scripts/generate.mjs --check    exit 1 if what is committed differs
//
// Needs buf: the one in the .venv of the repository, or the one that BUF names.
import { execFileSync } from "node:child_process";
import { mkdtempSync, readdirSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join, resolve } from "node:path";
import { fileURLToPath } from "node:url";

const ROOT = fileURLToPath(new URL("../../..", import.meta.url));
const GENERATED = "clients/typescript/src/gen";
const BUF = process.env.BUF ?? join(ROOT, ".venv/bin/buf");

function generateInto(folder) {
  rmSync(join(folder, GENERATED), { recursive: true, force: true });
  execFileSync(BUF, ["generate", "--template", "clients/typescript/buf.gen.yaml", "--output", folder], {
    cwd: ROOT,
    stdio: "inherit",
  });
}

/** The generated files below `folder`: path and text of each. */
function snapshot(folder) {
  const top = join(folder, GENERATED);
  const files = readdirSync(top, { recursive: true, withFileTypes: true }).filter((entry) => entry.isFile());
  return files
    .map(({ parentPath, path, name }) => join(parentPath ?? path, name))
    .sort()
    .map((file) => [file.slice(top.length), readFileSync(file, "utf8")]);
}

function isFresh() {
  const folder = mkdtempSync(join(tmpdir(), "lda-generate-"));
  try {
    generateInto(folder);
    return JSON.stringify(snapshot(folder)) === JSON.stringify(snapshot(ROOT));
  } finally {
    rmSync(folder, { recursive: true });
  }
}

if (!process.argv.includes("--check")) {
  generateInto(resolve(ROOT));
} else if (!isFresh()) {
  console.error("src/gen is stale: run `npm run generate` and commit what it writes.");
  process.exit(1);
}
