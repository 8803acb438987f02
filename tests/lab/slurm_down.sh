#!/usr/bin/env bash
# End the Slurm that slurm_up.sh started in this folder, and all of its jobs. The folder itself, with the logs, stays.
set -uo pipefail

FOLDER=$(realpath -m "${1:?the folder that the cluster is kept in}")

end() { # daemons by the files that hold their process numbers; nothing of theirs is wanted any more
  local pid
  for file in "$@"; do
    pid=$(cat "$file" 2>/dev/null) && kill -KILL "$pid" 2>/dev/null
    rm -f "$file"
  done
}

end "$FOLDER/slurmctld.pid" "$FOLDER"/slurmd-*.pid
# What ran on a node has its network: steps, and whatever they have left behind.
for space in $(ip netns list | awk '/^slurm[0-9]+/ { print $1 }'); do
  for pid in $(ip netns pids "$space"); do kill -KILL "$pid" 2>/dev/null; done
  ip netns del "$space"
done
end "$FOLDER/slurmdbd.pid" "$FOLDER/mysql/mariadbd.pid" "$FOLDER/munge/munged.pid"
ip link del utslurm 2>/dev/null
hosts=$(grep -v '# unitrain slurm$' /etc/hosts) && printf '%s\n' "$hosts" >/etc/hosts # in place: it may be a mount
exit 0
