#!/usr/bin/env bash
# A real Kubernetes on this machine, as root, without systemd and without a registry.
#
#   k8s_up.sh [api] [node] [crds]     (api and node unless given)
#
#   api    etcd, API server, controllers and scheduler of 1.20; writes $LAB/kubeconfig
#   node   containerd and a kubelet as node1, and the image localhost/host:1 (see k8s_image.sh)
#   crds   the custom-resource server of 1.36 on https://127.0.0.1:16444, with the CRDs in UNITRAIN_LAB_K8S_CRDS
#
# Nothing of this can be installed: the servers come from a folder named by UNITRAIN_LAB_K8S_BIN, as <name>.xz, built
# from Debian's source packages kubernetes (1.20) and golang-k8s-apiextensions-apiserver-dev (1.36). What they stand
# on is installed by apt. State is in UNITRAIN_LAB_K8S (/var/lib/unitrain-k8s); k8s_down.sh stops everything.
# Exit code 77: this machine cannot; the last line says why.
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
LAB=${UNITRAIN_LAB_K8S:-/var/lib/unitrain-k8s}
WANTED=" ${*:-api node} "
API=127.0.0.1:16443 CRD=127.0.0.1:16444 ETCD=127.0.0.1:16379 ETCD_PEER=127.0.0.1:16380
PODS=10.66.0.0/24 SERVICES=10.96.0.0/16

main() {
  [[ $(id -u) == 0 ]] || cannot "a Kubernetes of our own needs root"
  [[ -d ${UNITRAIN_LAB_K8S_BIN:-} ]] || cannot "UNITRAIN_LAB_K8S_BIN names no folder with kube-apiserver.xz and others"
  mkdir -p "$LAB"/{bin,pki,log,run,etcd}
  chmod 700 "$LAB/etcd"
  install_packages
  unpack_servers
  make_keys
  start_api
  if [[ $WANTED == *" node "* ]]; then start_node; fi
  if [[ $WANTED == *" crds "* ]]; then start_crds; fi
  echo "export KUBECONFIG=$LAB/kubeconfig"
}

cannot() {
  echo "$*" >&2
  exit 77
}

install_packages() {
  local missing=() pair
  local needed=(etcd:etcd-server openssl:openssl curl:curl xz:xz-utils)
  if [[ $WANTED == *" node "* ]]; then
    needed+=(containerd:containerd runc:runc ip:iproute2 catatonit:catatonit iptables:iptables
             /usr/lib/cni/bridge:containernetworking-plugins)
  fi
  for pair in "${needed[@]}"; do
    command -v "${pair%%:*}" >/dev/null || missing+=("${pair##*:}")
  done
  [ ${#missing[@]} -eq 0 ] && return
  command -v apt-get >/dev/null || cannot "there is no apt-get to install ${missing[*]}"
  export DEBIAN_FRONTEND=noninteractive
  local install=(apt-get install -o DPkg::Lock::Timeout=300 -y --no-install-recommends "${missing[@]}")
  "${install[@]}" >"$LAB/log/apt.log" 2>&1 || { apt-get update && "${install[@]}"; } >"$LAB/log/apt.log" 2>&1 \
    || cannot "apt-get cannot install ${missing[*]}; see $LAB/log/apt.log"
}

unpack_servers() {
  local packed name
  for packed in "$UNITRAIN_LAB_K8S_BIN"/*.xz; do
    name=$LAB/bin/$(basename "$packed" .xz)
    [ -x "$name" ] && continue
    xz -dc "$packed" >"$name.part"
    chmod +x "$name.part"
    mv "$name.part" "$name"
  done
  PATH=$LAB/bin:$PATH
}

# A certificate authority, the server's certificate, an administrator's, and the key of service accounts.
make_keys() {
  cd "$LAB/pki"
  [ -f sa.pub ] && return
  openssl req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.crt -subj /CN=lab -days 3650 2>/dev/null
  certificate api /CN=kube-apiserver "subjectAltName=DNS:localhost,DNS:kubernetes.default.svc,IP:127.0.0.1,IP:10.96.0.1"
  certificate admin /O=system:masters/CN=admin extendedKeyUsage=clientAuth
  certificate alice /CN=alice extendedKeyUsage=clientAuth # a user with no rights but those that a test gives
  kubeconfig admin "$LAB/kubeconfig"
  kubeconfig alice "$LAB/kubeconfig-alice"
  openssl genrsa -out sa.key 2048 2>/dev/null
  openssl rsa -in sa.key -pubout -out sa.pub 2>/dev/null
}

certificate() {
  openssl req -newkey rsa:2048 -nodes -keyout "$1.key" -out "$1.csr" -subj "$2" 2>/dev/null
  openssl x509 -req -in "$1.csr" -CA ca.crt -CAkey ca.key -CAcreateserial -out "$1.crt" -days 3650 \
    -extfile <(printf '%s' "$3") 2>/dev/null
}

kubeconfig() {
  cat >"$2" <<END
apiVersion: v1
kind: Config
current-context: lab
clusters: [{name: lab, cluster: {server: "https://$API", certificate-authority: $LAB/pki/ca.crt}}]
users: [{name: $1, user: {client-certificate: $LAB/pki/$1.crt, client-key: $LAB/pki/$1.key}}]
contexts: [{name: lab, context: {cluster: lab, user: $1}}]
END
}

start_api() {
  start etcd etcd --data-dir "$LAB/etcd" --listen-client-urls "http://$ETCD" --advertise-client-urls "http://$ETCD" \
    --listen-peer-urls "http://$ETCD_PEER" --initial-advertise-peer-urls "http://$ETCD_PEER" \
    --initial-cluster "default=http://$ETCD_PEER" --unsafe-no-fsync
  # No endpoint for the service `kubernetes`: pods have no way to the server, and need none.
  start apiserver kube-apiserver --etcd-servers="http://$ETCD" --secure-port="${API#*:}" --bind-address=127.0.0.1 \
    --advertise-address=127.0.0.1 --endpoint-reconciler-type=none --service-cluster-ip-range="$SERVICES" \
    --tls-cert-file="$LAB/pki/api.crt" --tls-private-key-file="$LAB/pki/api.key" \
    --client-ca-file="$LAB/pki/ca.crt" --authorization-mode=Node,RBAC --allow-privileged=true \
    --service-account-key-file="$LAB/pki/sa.pub" --service-account-signing-key-file="$LAB/pki/sa.key" \
    --service-account-issuer=https://kubernetes.default.svc --kubelet-preferred-address-types=InternalIP
  until_true 90 ask "https://$API/readyz"
  start controllers kube-controller-manager --kubeconfig="$LAB/kubeconfig" --leader-elect=false \
    --service-account-private-key-file="$LAB/pki/sa.key" --root-ca-file="$LAB/pki/ca.crt" \
    --use-service-account-credentials=true --node-monitor-grace-period=20s
  start scheduler kube-scheduler --kubeconfig="$LAB/kubeconfig" --leader-elect=false
  # The first pods of a namespace wait for its service account.
  until_true 60 ask "https://$API/api/v1/namespaces/default/serviceaccounts/default"
}

start_node() {
  mkdir -p "$LAB"/{cni,kubelet,pause}
  cat >"$LAB/cni/10-lab.conflist" <<END
{"cniVersion": "0.4.0", "name": "unitrain", "plugins": [{"type": "bridge", "bridge": "unitrain9", "isGateway": true,
 "ipam": {"type": "host-local", "ranges": [[{"subnet": "$PODS"}]], "routes": [{"dst": "0.0.0.0/0"}]}}]}
END
  # restrict_oom_score_adj: root may lack CAP_SYS_RESOURCE
  cat >"$LAB/containerd.toml" <<END
version = 2
root = "$LAB/containerd"
state = "$LAB/run/containerd"
[grpc]
  address = "$LAB/run/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  restrict_oom_score_adj = true
  sandbox_image = "localhost/pause:1"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "$LAB/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
END
  cat >"$LAB/kubelet.yaml" <<END
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
cgroupDriver: cgroupfs
failSwapOn: false
enforceNodeAllocatable: []
oomScoreAdj: 0
maxOpenFiles: 20000
imageGCHighThresholdPercent: 100
evictionHard: {memory.available: 50Mi, nodefs.available: 1%, imagefs.available: 1%, nodefs.inodesFree: 1%}
authentication: {anonymous: {enabled: true}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}
clusterDNS: []
END
  start containerd containerd --config "$LAB/containerd.toml"
  until_true 30 ctr -a "$LAB/run/containerd.sock" version
  cp "$(command -v catatonit)" "$LAB/pause/pause"
  "$HERE/k8s_image.sh" "$LAB/pause" localhost/pause:1 '["/pause", "-P"]'
  host_image
  # Not a loopback address: the server could not reach the kubelet for logs.
  local address
  address=$(ip -4 -o addr show scope global | awk 'NR == 1 {sub("/.*", "", $4); print $4}')
  start kubelet kubelet --config="$LAB/kubelet.yaml" --kubeconfig="$LAB/kubeconfig" --hostname-override=node1 \
    --root-dir="$LAB/kubelet" --cert-dir="$LAB/kubelet/pki" --node-ip="$address" --cgroup-root=/ \
    --container-runtime=remote --container-runtime-endpoint="unix://$LAB/run/containerd.sock"
  until_true 90 node_ready
}

# An image with nothing in it: pods that use it mount /usr and a Python environment of this machine.
host_image() {
  local root=$LAB/host
  mkdir -p "$root"/{usr,etc,tmp,root,proc,sys,dev}
  chmod 1777 "$root/tmp"
  ln -sfn usr/bin "$root/bin"
  ln -sfn usr/sbin "$root/sbin"
  ln -sfn usr/lib "$root/lib"
  ln -sfn usr/lib64 "$root/lib64"
  echo root:x:0:0:root:/root:/bin/sh >"$root/etc/passwd"
  echo root:x:0: >"$root/etc/group"
  "$HERE/k8s_image.sh" "$root" localhost/host:1
}

node_ready() {
  [[ $(ask "https://$API/api/v1/nodes/node1") == *KubeletReady* ]]
}

start_crds() {
  [[ -d ${UNITRAIN_LAB_K8S_CRDS:-} ]] || cannot "UNITRAIN_LAB_K8S_CRDS names no folder with CRDs"
  start crds apiextensions-apiserver --etcd-servers="http://$ETCD" --etcd-prefix=/crds --secure-port="${CRD#*:}" \
    --bind-address=127.0.0.1 --tls-cert-file="$LAB/pki/api.crt" --tls-private-key-file="$LAB/pki/api.key" \
    --client-ca-file="$LAB/pki/ca.crt" --kubeconfig="$LAB/kubeconfig" --authorization-kubeconfig="$LAB/kubeconfig" \
    --authentication-kubeconfig="$LAB/kubeconfig" --authentication-skip-lookup \
    --authentication-tolerate-lookup-failure --enable-priority-and-fairness=false \
    --disable-admission-plugins=ValidatingAdmissionPolicy,MutatingAdmissionPolicy,MutatingAdmissionWebhook,ValidatingAdmissionWebhook
  until_true 60 ask "https://$CRD/readyz"
  local file
  for file in "$UNITRAIN_LAB_K8S_CRDS"/*.yaml; do # one that is there from before is refused, which is as well
    ask -X POST -H 'Content-Type: application/yaml' --data-binary @"$file" \
      "https://$CRD/apis/apiextensions.k8s.io/v1/customresourcedefinitions" >/dev/null || true
  done
}

start() {
  local name=$1
  shift
  if [ -f "$LAB/run/$name.pid" ] && kill -0 "$(cat "$LAB/run/$name.pid")" 2>/dev/null; then return; fi
  setsid "$@" >"$LAB/log/$name.log" 2>&1 </dev/null &
  echo $! >"$LAB/run/$name.pid"
}

ask() {
  curl -sf --cacert "$LAB/pki/ca.crt" --cert "$LAB/pki/admin.crt" --key "$LAB/pki/admin.key" "$@"
}

until_true() {
  local seconds=$1 i
  shift
  for ((i = 0; i < seconds * 5; i++)); do
    if "$@" >/dev/null 2>&1; then return; fi
    sleep 0.2
  done
  echo "after $seconds s still not true: $*; see $LAB/log" >&2
  exit 1
}

main
