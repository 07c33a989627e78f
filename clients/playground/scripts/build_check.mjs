// Whether the committed files are what the sources build to: builds elsewhere and compares, file by file.
import { mkdtemp, readdir, readFile, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { build } from "vite";

const COMMITTED = fileURLToPath(new URL("../../../lda_service/playground", import.meta.url));

const fresh = await mkdtemp(join(tmpdir(), "playground-"));
try {
  await build({ logLevel: "warn", build: { outDir: fresh } });
  const [made, kept] = [await contents(fresh), await contents(COMMITTED)];
  const names = new Set([...made.keys(), ...kept.keys()]);
  const stale = [...names].filter((name) => !made.get(name)?.equals(kept.get(name) ?? Buffer.alloc(0)));
  if (stale.length > 0) {
    console.error(`stale: ${stale.join(", ")}; run \`npm run build\` and commit lda_service/playground`);
    process.exitCode = 1;
  } else {
    console.log("lda_service/playground is fresh");
  }
} finally {
  await rm(fresh, { recursive: true });
}

async function contents(folder) {
  const entries = await readdir(folder, { recursive: true, withFileTypes: true }).catch(() => []);
  const files = entries.filter((entry) => entry.isFile()).map((entry) => join(entry.parentPath, entry.name));
  return new Map(await Promise.all(files.map(async (file) => [file.slice(folder.length + 1), await readFile(file)])));
}
