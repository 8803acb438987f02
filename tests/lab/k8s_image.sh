#!/usr/bin/env bash
# Puts a folder into the lab's containerd as an image, without a registry; pods use it with imagePullPolicy Never.
#
#   k8s_image.sh FOLDER NAME:TAG ['["the", "entry", "point"]']
set -euo pipefail

FOLDER=$1 NAME=$2 ENTRY=${3:-null}
LAB=${UNITRAIN_LAB_K8S:-/var/lib/unitrain-k8s}
images() { ctr -a "$LAB/run/containerd.sock" -n k8s.io images "$@"; }

# No pipe into grep -q: it leaves at the first match, and the other end then fails.
present() { [[ $'\n'$(images ls -q)$'\n' == *$'\n'"$NAME"$'\n'* ]]; }

if present; then exit 0; fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
tar -C "$FOLDER" -cf "$work/layer.tar" .
layer=$(sha256sum "$work/layer.tar" | cut -d' ' -f1)
cat >"$work/config.json" <<END
{"architecture": "amd64", "os": "linux",
 "config": {"Entrypoint": $ENTRY, "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]},
 "rootfs": {"type": "layers", "diff_ids": ["sha256:$layer"]}}
END
echo "[{\"Config\": \"config.json\", \"RepoTags\": [\"$NAME\"], \"Layers\": [\"layer.tar\"]}]" >"$work/manifest.json"
tar -C "$work" -cf "$work/image.tar" manifest.json config.json layer.tar
images import "$work/image.tar" >/dev/null
present || { echo "containerd has no image $NAME after its import" >&2; exit 1; }
