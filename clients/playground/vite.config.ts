import { fileURLToPath } from "node:url";
import { defineConfig } from "vitest/config";

const at = (path: string) => fileURLToPath(new URL(path, import.meta.url));

export default defineConfig({
  base: "./",
  resolve: {
    alias: [
      { find: "@lda/client/web", replacement: at("../typescript/src/web.ts") },
      { find: "@lda/client", replacement: at("../typescript/src/index.ts") },
    ],
    // The client's sources need what is installed here, whether or not it has an installation of its own.
    dedupe: ["@bufbuild/protobuf", "@connectrpc/connect", "@connectrpc/connect-web"],
  },
  worker: { format: "es" },
  build: {
    target: "es2022",
    // Colours are pairs of light and dark, by light-dark(); older browsers are not worth a second style sheet.
    cssTarget: ["chrome123", "firefox120", "safari17.5"],
    outDir: at("../../lda_service/playground"),
    emptyOutDir: true,
    modulePreload: false,
    // Every file has a name of its own content, and none is put into another: the page's policy forbids that.
    assetsInlineLimit: 0,
    reportCompressedSize: false,
  },
  server: { proxy: { "^/(lda[.]v1|generate_lda)": process.env.LDA_TARGET ?? "http://127.0.0.1:8000" } },
  test: { include: ["test/*.test.ts"] },
});
