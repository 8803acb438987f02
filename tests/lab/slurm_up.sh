#!/usr/bin/env bash
# A real Slurm on this machine, for tests: one controller here and several nodes, each with a network, an address and a
# host name of its own. Disks are shared, GPUs are only numbers. Needs root; takes a second once all is installed.
#
#   NODES=3 ACCOUNTING=no tests/lab/slurm_up.sh FOLDER
#   . FOLDER/env; sinfo
#   tests/lab/slurm_down.sh FOLDER
set -euo pipefail

FOLDER=$(realpath -m "${1:?the folder to keep the cluster in}")
NODES=${NODES:-3}                 # named slurm1, slurm2, ...
CPUS=${CPUS:-4}                   # of each node, as far as Slurm knows
GPUS=${GPUS:-4}
ACCOUNTING=${ACCOUNTING:-no}      # yes: with slurmdbd, so that sacct knows ended jobs
KILL_WAIT=${KILL_WAIT:-20}        # seconds from SIGTERM to SIGKILL
MIN_JOB_AGE=${MIN_JOB_AGE:-300}   # seconds for which squeue knows an ended job
NETWORK=10.117.0
BRIDGE=utslurm
MARK="# unitrain slurm"           # ends the lines that we add to /etc/hosts
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

await() { # SECONDS COMMAND...
  local tenths=$(($1 * 10))
  shift
  until "$@" >/dev/null 2>&1; do
    ((tenths-- > 0)) || { echo "slurm_up: still not so: $*" >&2; return 1; }
    sleep 0.1
  done
}

install_packages() {
  local needed=(slurm-wlm munge iproute2) missing=()
  [[ $ACCOUNTING == no ]] || needed+=(slurmdbd slurm-wlm-mysql-plugin mariadb-server)
  for name in "${needed[@]}"; do
    dpkg-query -W -f '${Status}' "$name" 2>/dev/null | grep -q 'ok installed' || missing+=("$name")
  done
  [[ ${#missing[@]} -eq 0 ]] && return
  export DEBIAN_FRONTEND=noninteractive
  # This policy keeps Debian from starting what it installs.
  if [[ ! -e /usr/sbin/policy-rc.d ]]; then
    printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
    chmod +x /usr/sbin/policy-rc.d
    trap 'rm -f /usr/sbin/policy-rc.d' EXIT
  fi
  apt-get install -y -qq --no-install-recommends "${missing[@]}" >"$FOLDER/log/apt.log" 2>&1 ||
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends "${missing[@]}"; } >>"$FOLDER/log/apt.log" 2>&1
}

start_munge() { # every message between Slurm's parts is signed with this key
  install -d -o munge -g munge -m 755 "$FOLDER/munge"
  install -d -o munge -g munge -m 700 "$FOLDER/munge/private"
  head -c 1024 /dev/urandom >"$FOLDER/munge/private/key"
  chown munge: "$FOLDER/munge/private/key"
  chmod 400 "$FOLDER/munge/private/key"
  setpriv --reuid munge --regid munge --clear-groups munged --key-file="$FOLDER/munge/private/key" \
    --socket="$FOLDER/munge/socket" --pid-file="$FOLDER/munge/munged.pid" --log-file="$FOLDER/munge/private/log" \
    --seed-file="$FOLDER/munge/private/seed"
  await 5 munge --socket "$FOLDER/munge/socket" -n
}

make_network() {
  ip link add "$BRIDGE" type bridge
  ip addr add "$NETWORK.254/24" dev "$BRIDGE"
  ip link set "$BRIDGE" up
  for ((n = 1; n <= NODES; n++)); do
    ip netns add "slurm$n"
    ip link add "utslurm$n" type veth peer name eth0 netns "slurm$n"
    ip link set "utslurm$n" master "$BRIDGE" up
    ip -n "slurm$n" addr add "$NETWORK.1$n/24" dev eth0
    ip -n "slurm$n" link set eth0 up
    ip -n "slurm$n" link set lo up
    echo "$NETWORK.1$n slurm$n $MARK" >>/etc/hosts
  done
}

write_configuration() {
  local cgroups=disabled
  [[ $(slurmd -V) =~ \ (2[012]\.|23\.02) ]] && cgroups=cgroup/v1 # named, and never used
  echo "CgroupPlugin=$cgroups" >"$FOLDER/etc/cgroup.conf"
  ((GPUS == 0)) || echo "Name=gpu File=/dev/tty[0-$((GPUS - 1))]" >"$FOLDER/etc/gres.conf"
  {
    cat <<CONF
ClusterName=unitrain
SlurmctldHost=$(hostname -s)($NETWORK.254)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job may start once the credential of the one before has expired.
AuthInfo=socket=$FOLDER/munge/socket,cred_expire=5
SlurmctldPort=16817
SlurmdPort=16818
SlurmctldPidFile=$FOLDER/slurmctld.pid
SlurmctldLogFile=$FOLDER/log/slurmctld.log
StateSaveLocation=$FOLDER/state
SlurmdSpoolDir=$FOLDER/spool-%n
SlurmdPidFile=$FOLDER/slurmd-%n.pid
SlurmdLogFile=$FOLDER/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
SlurmdTimeout=10
SlurmctldTimeout=10
KillWait=$KILL_WAIT
MinJobAge=$MIN_JOB_AGE
MessageTimeout=10
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,batch_sched_delay=0,sched_interval=2
CONF
    if [[ $ACCOUNTING != no ]]; then
      echo AccountingStorageType=accounting_storage/slurmdbd
      echo "AccountingStorageHost=$NETWORK.254"
      echo AccountingStoragePort=16819
      echo "AccountingStoragePass=$FOLDER/munge/socket" # it wants the socket once more
    fi
    for ((n = 1; n <= NODES; n++)); do
      echo "NodeName=slurm$n NodeAddr=$NETWORK.1$n CPUs=$CPUS RealMemory=4000 $( ((GPUS == 0)) || echo "Gres=gpu:$GPUS")"
    done
    echo "PartitionName=normal Nodes=slurm[1-$NODES] Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE"
    echo "PartitionName=grace Nodes=slurm[1-$NODES] MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=30"
    echo "PartitionName=high Nodes=slurm[1-$NODES] MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF"
  } >"$FOLDER/etc/slurm.conf"
  printf 'export SLURM_CONF=%q/etc/slurm.conf\n' "$FOLDER" >"$FOLDER/env"
}

start_accounting() {
  install -d -o mysql -g mysql "$FOLDER/mysql"
  mariadb-install-db --user=mysql --datadir="$FOLDER/mysql" --skip-test-db \
    --auth-root-authentication-method=socket >"$FOLDER/log/mysql-install.log" 2>&1
  setsid mariadbd --no-defaults --user=mysql --datadir="$FOLDER/mysql" --socket="$FOLDER/mysql/socket" \
    --bind-address=127.0.0.1 --port=13306 --innodb-buffer-pool-size=64M --innodb-log-file-size=16M --innodb-lock-wait-timeout=900 \
    --pid-file="$FOLDER/mysql/mariadbd.pid" >"$FOLDER/log/mariadb.log" 2>&1 </dev/null &
  await 30 mariadb-admin --socket="$FOLDER/mysql/socket" ping
  mariadb --socket="$FOLDER/mysql/socket" -e "CREATE DATABASE slurm_acct_db; CREATE USER slurm@localhost; \
    GRANT ALL ON slurm_acct_db.* TO slurm@localhost"
  cat >"$FOLDER/etc/slurmdbd.conf" <<CONF
AuthType=auth/munge
AuthInfo=socket=$FOLDER/munge/socket
DbdHost=$(hostname -s)
DbdAddr=$NETWORK.254
DbdPort=16819
SlurmUser=root
LogFile=$FOLDER/log/slurmdbd.log
PidFile=$FOLDER/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=13306
StorageUser=slurm
StorageLoc=slurm_acct_db
CONF
  chmod 600 "$FOLDER/etc/slurmdbd.conf"
  slurmdbd
  await 30 timeout 5 sacctmgr -n show cluster
  sacctmgr -i add cluster unitrain >/dev/null
}

start_node() { # N
  mkdir -p "$FOLDER/spool-slurm$1"
  # Not `ip netns exec`: that mounts /sys anew, and slurmd then misses the cgroups.
  nsenter --net="/run/netns/slurm$1" unshare --uts bash -c "hostname slurm$1 && exec slurmd -N slurm$1"
}

all_idle() { [[ $(sinfo -h -p normal -t idle -o %D) == "$NODES" ]]; }

[[ $EUID -eq 0 ]] || { echo "slurm_up: only root can make network namespaces" >&2; exit 1; }
mkdir -p "$FOLDER"/{etc,log,state}
chmod 755 "$FOLDER"
install_packages
trap '"$HERE/slurm_down.sh" "$FOLDER"' ERR # leave nothing half done
start_munge
make_network
write_configuration
# shellcheck source=/dev/null
. "$FOLDER/env"
[[ $ACCOUNTING == no ]] || start_accounting
slurmctld
await 20 scontrol ping
for ((n = 1; n <= NODES; n++)); do start_node "$n"; done
await 30 all_idle
