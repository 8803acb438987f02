#!/usr/bin/env bash
# Stops what k8s_up.sh has started, containers included; --purge also forgets the cluster, but not its programs.
set -uo pipefail

LAB=${UNITRAIN_LAB_K8S:-/var/lib/unitrain-k8s}
API=https://127.0.0.1:16443

stop() {
  local file=$LAB/run/$1.pid pid i
  pid=$(cat "$file" 2>/dev/null) || return
  rm -f "$file"
  # The number may be another process's by now.
  [[ $(tr '\0' ' ' <"/proc/$pid/cmdline" 2>/dev/null) == *"$LAB"* ]] || return
  kill "$pid"
  for ((i = 0; i < 50; i++)); do
    kill -0 "$pid" 2>/dev/null || return
    sleep 0.1
  done
  kill -9 "$pid" 2>/dev/null
}

ask() {
  curl -sf --max-time 10 --cacert "$LAB/pki/ca.crt" --cert "$LAB/pki/admin.crt" --key "$LAB/pki/admin.key" "$@"
}

# The kubelet takes containers and their networks down, as long as it and the server are there.
clear_pods() {
  local space i
  for space in $(ask "$API/api/v1/namespaces" | awk -F'"' '/^        "name":/ {print $4}'); do
    ask -X DELETE "$API/apis/batch/v1/namespaces/$space/jobs?propagationPolicy=Background" >/dev/null
    ask -X DELETE "$API/api/v1/namespaces/$space/pods?gracePeriodSeconds=1" >/dev/null
  done
  for ((i = 0; i < 100; i++)); do
    [[ $(ctr -a "$LAB/run/containerd.sock" -n k8s.io tasks ls -q 2>/dev/null) ]] || return
    sleep 0.2
  done
}

if [ -f "$LAB/run/kubelet.pid" ]; then clear_pods; fi
stop kubelet
# Containers outlive kubelet and containerd: each has a shim, whose command line names the lab's socket.
for shim in $(ps -eo pid=,args= | awk -v lab="$LAB/" '/containerd-shim/ && !/awk/ && index($0, lab) {print $1}'); do
  pkill -9 -P "$shim" 2>/dev/null
  kill -9 "$shim" 2>/dev/null
done
for name in crds scheduler controllers apiserver etcd containerd; do stop "$name"; done

if [ "${1:-}" = --purge ]; then
  awk -v lab="$LAB/" 'index($2, lab) == 1 {print $2}' /proc/mounts | sort -r | xargs -r umount
  find "$LAB" -mindepth 1 -maxdepth 1 ! -name bin -exec rm -rf {} +
  rm -rf /var/lib/cni/networks/unitrain
  ip link del unitrain9 2>/dev/null
fi
exit 0
