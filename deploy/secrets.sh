#!/usr/bin/env bash
# Fresh Secrets for an overlay, as YAML on standard output; nothing is written to disk and nothing is sent anywhere:
#   deploy/secrets.sh | kubectl apply -f -
# Applied again it replaces them: then restart everything (docs/deploy.md). Needs kubectl, openssl.
#   NAMESPACE=mooncake ETCD_SERVERS=3 ETCD_DAYS=825 deploy/secrets.sh
set -euo pipefail
namespace=${NAMESPACE:-mooncake}
servers=${ETCD_SERVERS:-3}
days=${ETCD_DAYS:-825}
umask 077
work=$(mktemp -d -p "${XDG_RUNTIME_DIR:-/dev/shm}")
trap 'rm -rf "$work"' EXIT
cd "$work"

secret() { # NAME FILE...: one Secret, each file under its own name
  local name=$1 file parts=()
  shift
  for file in "$@"; do parts+=(--from-file="$file"); done
  echo "---"
  kubectl create secret generic "$name" --namespace "$namespace" --dry-run=client -o yaml "${parts[@]}"
}

random() { openssl rand -hex 32 | tr -d '\n' >"$1"; }
random secret # of the cluster: who has it belongs to it
random token  # of the admin ports, also Prometheus'
random key    # of the API: what clients send
secret mooncake-cluster secret
secret mooncake-admin token
secret mooncake-api key

# etcd: an authority of its own, whose key is thrown away at the end
key=(-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes)
openssl req -x509 "${key[@]}" -keyout ca.key -out ca.crt -days "$days" -subj /CN=mooncake-etcd-authority \
  -addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,keyCertSign 2>/dev/null
certificate() { # FILE SUBJECT EXTENSIONS
  openssl req "${key[@]}" -keyout "$1.key" -out "$1.csr" -subj "$2" 2>/dev/null
  openssl x509 -req -in "$1.csr" -CA ca.crt -CAkey ca.key -CAcreateserial -days "$days" -out "$1.crt" \
    -extfile <(printf '%s\n' "$3") 2>/dev/null
}
names=DNS:localhost,IP:127.0.0.1
for ((i = 0; i < servers; i++)); do
  for domain in "" ".$namespace.svc" ".$namespace.svc.cluster.local"; do names+=",DNS:etcd-$i.etcd-peers$domain"; done
done
# etcd's JSON gateway is a client of its own server: hence clientAuth for servers too (docs/adr/0005)
certificate server /CN=etcd "subjectAltName=$names
extendedKeyUsage=serverAuth,clientAuth"
# without a common name: etcd would take it for a user
certificate client /O=mooncake "extendedKeyUsage=clientAuth"
for kind in server client; do
  mkdir "$kind"
  cp ca.crt "$kind/ca.crt"
  mv "$kind.crt" "$kind/tls.crt"
  mv "$kind.key" "$kind/tls.key"
  secret "mooncake-etcd-$kind" "$kind/ca.crt" "$kind/tls.crt" "$kind/tls.key"
done
