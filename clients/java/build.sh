#!/usr/bin/env bash
# Compiles the client, its tests, samples and conformance adapter into build/, offline, against Debian's jars.
#   build/lda-client.jar   the client with the generated code; build/classpath lists what it needs beside it
#   build/adapter          the conformance adapter
#   build/samples/NAME     the samples: basic, stream, alpha_sweep, cancel
#   build/test             the tests
# Needs: apt-get install --no-install-recommends openjdk-17-jdk-headless libgrpc-java libprotobuf-java libnetty-java \
#   libperfmark-java libguava-java libgoogle-gson-java libjsr305-java libgeronimo-annotation-1.3-spec-java \
#   libnetty-tcnative-java junit4
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

readonly jars=/usr/share/java
readonly libraries=$(printf "$jars/%s.jar:" \
  grpc-api grpc-context grpc-core grpc-netty grpc-protobuf grpc-protobuf-lite grpc-stub protobuf protobuf-util \
  guava gson perfmark-api opencensus-api error-prone-annotations jsr305 geronimo-annotation-1.3-spec \
  netty-buffer netty-codec netty-codec-http netty-codec-http2 netty-common netty-handler netty-resolver \
  netty-transport netty-tcnative junit4 hamcrest)
# Debian's netty has TLS with HTTP/2 through OpenSSL alone, and looks for the native library under another name.
readonly native=$PWD/build/native
readonly strict=(-Xlint:all -Werror)

# compile FOLDER CLASSPATH FLAGS... FILES...
compile() {
  local into=$1 classpath=$2
  shift 2
  mkdir -p "$into"
  javac --release 17 -encoding UTF-8 -proc:none -d "$into" -cp "$classpath" "$@"
}

sources() { find "$@" -name '*.java'; }

# launcher FILE ARGUMENTS: a script that runs java from anywhere.
launcher() {
  printf '#!/bin/sh\nexec java -cp "%s" %s "$@"\n' "$programs" "$2" >"$1"
  chmod +x "$1"
}

rm -rf build/main build/programs build/samples
# Seconds of work that change with the contract alone.
if [ ! -e build/gen.stamp ] || [ -n "$(find src/gen build.sh -newer build/gen.stamp)" ]; then
  rm -rf build/gen
  compile build/gen "$libraries" -nowarn -Xlint:none $(sources src/gen)
  touch build/gen.stamp
fi
compile build/main "build/gen:$libraries" "${strict[@]}" $(sources src/main)
compile build/programs "build/main:build/gen:$libraries" "${strict[@]}" $(sources src/conformance src/test samples)

mkdir -p "$native/META-INF/native"
cp /usr/lib/*/jni/libnetty-tcnative.so "$native/META-INF/native/libnetty_tcnative.so"
jar --create --file build/lda-client.jar -C build/gen . -C build/main .
echo "$libraries$native" >build/classpath
readonly programs=$PWD/build/programs:$PWD/build/lda-client.jar:$libraries$native
launcher build/adapter lda.conformance.Adapter
launcher build/test "org.junit.runner.JUnitCore $(cd src/test/java &&
  find . -name '*Test.java' | sort | sed 's|^\./||; s|\.java$||; s|/|.|g' | paste -sd' ')"
mkdir -p build/samples
for sample in basic:Basic stream:Stream alpha_sweep:AlphaSweep cancel:Cancel; do
  launcher "build/samples/${sample%:*}" "${sample#*:}"
done
