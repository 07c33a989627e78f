#!/usr/bin/env bash
# Makes a throw-away certificate authority and certificates for mutual TLS between a proxy and the servers, for tests
# and trials; in a cluster, cert-manager or the mesh makes them.
#
#   deploy/certificates.sh FOLDER [NAMESPACE]
#
# Writes ca.crt, ca.key, server.crt, server.key (the servers) and client.crt, client.key (the proxy, or a caller) there.
# An authority that is there already signs the new certificates.
set -euo pipefail

if [ $# -lt 1 ]; then
  sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
folder=$1 namespace=${2:-default} days=30
umask 077
mkdir -p "$folder"
cd "$folder"

key=(-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes)
[ -f ca.key ] || openssl req -x509 "${key[@]}" -days "$days" -subj "/CN=lda-service throw-away CA" -keyout ca.key -out ca.crt \
  -addext "basicConstraints=critical,CA:TRUE" -addext "keyUsage=critical,keyCertSign,cRLSign" 2>/dev/null

certificate() { # file name, alternative names, extended key usage
  openssl req "${key[@]}" -subj "/CN=$1" -keyout "$1.key" -out "$1.csr" 2>/dev/null
  openssl x509 -req -in "$1.csr" -CA ca.crt -CAkey ca.key -CAcreateserial -days "$days" -out "$1.crt" 2>/dev/null \
    -extfile <(printf 'subjectAltName=%s\nextendedKeyUsage=%s\nkeyUsage=digitalSignature\nbasicConstraints=CA:FALSE\n' "$2" "$3")
  rm "$1.csr"
}

service="spiffe://cluster.local/ns/$namespace/sa"
certificate server "DNS:lda-service,DNS:lda-service.$namespace.svc,DNS:localhost,IP:127.0.0.1,URI:$service/lda-service" serverAuth
certificate client "DNS:lda-front,URI:$service/lda-front" clientAuth
rm -f ca.srl
