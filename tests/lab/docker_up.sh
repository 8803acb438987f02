#!/usr/bin/env bash
# Start a container daemon of our own below FOLDER, and make a base image for it without any registry.
#
#   tests/lab/docker_up.sh FOLDER       (an absolute path, short: sockets lie in it)
#
# Prints the address for DOCKER_HOST. Nothing outside FOLDER is touched: no iptables rule, no default bridge, no other
# daemon's state. tests/lab/docker_down.sh FOLDER ends it. The root file system of the base is kept in the user's cache.
# Exit code 77: this machine cannot; the last line says why.
set -euo pipefail

cannot() {
  echo "$*" >&2
  exit 77
}

folder=${1:?usage: docker_up.sh FOLDER}
base=unitrain-lab:bookworm
cache=${XDG_CACHE_HOME:-$HOME/.cache}/unitrain/lab
kept=$cache/bookworm-python.tar

[[ $(id -u) == 0 ]] || cannot "a container daemon needs root"
packages=()
[[ -x /usr/sbin/dockerd && -x /usr/bin/docker ]] || packages+=('^docker[.]io$' iptables)  # Debian's name for Docker, as apt's pattern: a registry has it too
command -v docker-compose >/dev/null || packages+=(docker-compose)
[[ -s $kept ]] || command -v debootstrap >/dev/null || packages+=(debootstrap)
if (( ${#packages[@]} )); then
  command -v apt-get >/dev/null || cannot "there is no apt-get to install ${packages[*]}"
  export DEBIAN_FRONTEND=noninteractive
  { apt-get update && apt-get install -o DPkg::Lock::Timeout=300 -y --no-install-recommends "${packages[@]}"; } >&2 \
    || cannot "apt-get cannot install ${packages[*]}"
fi

mkdir -p "$folder"
# A containerd of our own as well: dockerd would otherwise join one that it finds running.
printf 'disabled_plugins = ["io.containerd.grpc.v1.cri"]\noom_score = 0\n' >"$folder/containerd.toml"
setsid containerd --config "$folder/containerd.toml" --root "$folder/containerd" --state "$folder/containerd-run" \
  --address "$folder/containerd.sock" >"$folder/containerd.log" 2>&1 </dev/null &
echo $! >"$folder/containerd.pid"
for _ in $(seq 100); do [[ -S $folder/containerd.sock ]] && break; sleep 0.1; done
setsid dockerd --containerd "$folder/containerd.sock" --data-root "$folder/data" --exec-root "$folder/run" \
  --host "unix://$folder/docker.sock" --pidfile "$folder/dockerd.pid" \
  --bridge none --iptables=false --ip6tables=false --ip-forward=false --ip-masq=false \
  >"$folder/dockerd.log" 2>&1 </dev/null &
export DOCKER_HOST=unix://$folder/docker.sock
for _ in $(seq 300); do /usr/bin/docker version >/dev/null 2>&1 && break; sleep 0.1; done
/usr/bin/docker version >/dev/null 2>&1 || cannot "dockerd does not start: $(tail -n 1 "$folder/dockerd.log")"

if ! [[ -s $kept ]]; then
  mkdir -p "$cache"
  root=$(mktemp -d "$cache/root.XXXXXX")
  trap 'rm -rf "$root"' EXIT
  # the oldest Debian whose Python is new enough
  debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates,tini bookworm "$root" >&2 \
    || cannot "debootstrap cannot make a root file system"
  rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/cache/apt/*.bin "$root"/var/lib/apt/lists/*
  tar -C "$root" -c . >"$kept.$$"
  mv "$kept.$$" "$kept"
fi
/usr/bin/docker import --change 'ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin' \
  "$kept" "$base" >&2
/usr/bin/docker run --rm --network none "$base" true >&2 || cannot "the daemon runs, and no container does"
echo "$DOCKER_HOST"
