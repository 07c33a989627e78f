#!/bin/sh
# Writes the Go code of the contract to gen/, or with --check exits with 1 if what is committed differs.
# Needs buf (BUF, or that of the repository's environment) and Debian's protoc-gen-go and protoc-gen-go-grpc.
set -eu
cd "$(dirname "$0")"
buf=${BUF:-../../.venv/bin/buf}

if [ "${1:-}" != --check ]; then
  exec "$buf" generate --template buf.gen.yaml
fi
fresh=$(mktemp -d)
trap 'rm -rf "$fresh"' EXIT
"$buf" generate --template buf.gen.yaml --output "$fresh"
diff -r "$fresh/gen" gen || { echo "gen/ is stale: run clients/go/generate.sh" >&2; exit 1; }
