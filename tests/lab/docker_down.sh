#!/usr/bin/env bash
# End the container daemon that docker_up.sh started below FOLDER, with its containers and networks, and remove FOLDER.
set -euo pipefail

folder=${1:?usage: docker_down.sh FOLDER}
export DOCKER_HOST=unix://$folder/docker.sock
if /usr/bin/docker version >/dev/null 2>&1; then
  /usr/bin/docker ps --all --quiet | xargs -r /usr/bin/docker rm --force >/dev/null
  /usr/bin/docker network prune --force >/dev/null
fi
for name in dockerd containerd; do
  pid=$(cat "$folder/$name.pid" 2>/dev/null) || continue
  # The number may be another process's by now.
  [[ $(tr '\0' ' ' <"/proc/$pid/cmdline" 2>/dev/null) == *"$folder"* ]] || continue
  kill -TERM "$pid"
  for _ in $(seq 150); do kill -0 "$pid" 2>/dev/null || break; sleep 0.1; done
  kill -KILL "$pid" 2>/dev/null || true
done
awk -v below="$folder/" 'index($2, below) == 1 {print $2}' /proc/mounts | sort -r | xargs -r umount --lazy
rm -rf "$folder"
