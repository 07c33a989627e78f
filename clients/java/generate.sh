#!/usr/bin/env bash
# Writes the generated code of the contract to src/gen/java; with --check, compares it with what is there instead.
# Needs buf (BUF names it) and Debian's protobuf-compiler and protobuf-compiler-grpc-java-plugin.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

buf=${BUF:-.venv/bin/buf}
template=clients/java/buf.gen.yaml
if [ "${1:-}" != --check ]; then
  exec "$buf" generate --template "$template"
fi
fresh=$(mktemp -d)
trap 'rm -rf "$fresh"' EXIT
"$buf" generate --template "$template" --output "$fresh"
diff -r "$fresh/clients/java/src/gen" clients/java/src/gen || {
  echo "clients/java/src/gen is not what the contract gives: run clients/java/generate.sh" >&2
  exit 1
}
