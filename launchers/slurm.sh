# From here on the script is the same for every run: all that belongs to this one stands above, quoted.
set -uo pipefail # no -e: exit codes are read

say() { printf 'unitrain: %s\n' "$*" >&2; }

# End here, with a record for whoever asks how it went.
give_up() {
  say "$2"
  printf '{"exit_code": %d, "time": %d, "error": "%s"}\n' "$1" "$(date +%s)" "$2" >"$RUN_DIR/exit.json"
  exit "$1"
}

# True once `unitrain cancel` has asked for the end of this very job.
cancelled() { grep -qs '"cancelled"' "$RUN_DIR/job-state.json"; }

# So that Slurm says CANCELLED too.
end_cancelled() {
  scancel --quiet "$job"
  sleep 60 # until Slurm ends this script
  exit 143
}

# True when the run ended because a node did not come or come back. Slurm itself may take minutes to notice.
lost_a_node() {
  grep -s '"event": "fault"' "$RUN_DIR/events.jsonl" | tail -n 1 | grep -q 'did not come within [0-9.e+]* s"'
}

# True while Slurm runs this very start, and has not decided what becomes of it. On a node that Slurm took for lost, this
# script may still be there when the job has been started anew elsewhere.
still_ours() {
  local facts=""
  for _ in {1..5}; do # the controller may be busy
    facts=$(scontrol --oneliner show job "$job" 2>/dev/null) && break
    sleep 2
  done
  [[ $facts =~ \ JobState=(RUNNING|SIGNALING)\ .*\ Restarts=$attempt\  ]]
}

# Signal the agent of this node, which tells the others. Slurm passes nothing on to a job that it is ending.
tell_this_node() {
  local record pid
  record=$(grep -s "\"host\": \"$(uname -n)\"" "$RUN_DIR/agent.json") || return
  pid=$(grep -o '"pid": [0-9]*' <<<"$record" | head -n 1)
  tr '\0' ' ' 2>/dev/null <"/proc/${pid##* }/cmdline" | grep -qF "unitrain.agent $RUN_DIR " && kill -s "$1" "${pid##* }"
}

# Hand a signal to the agents, again and again until they have left: they may be about to start, and count it once.
tell_agents() {
  while [[ -z $agents ]] || kill -0 "$agents" 2>/dev/null; do
    if still_ours; then
      scancel --quiet --signal="$1" "$job"
    else
      tell_this_node "$1"
    fi
    sleep 2
  done
}

attempt=${SLURM_RESTART_COUNT:-0} # unset on the first start
# The number of one run of an array is also that of the whole array.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
agents=""
trap 'say "the time limit is near: stop and save"; tell_agents USR1 &' USR1
# Preempted, requeued, cancelled or out of time. Slurm tells the agents too, but not those that are about to start.
trap 'say "Slurm ends the job"; tell_agents TERM &' TERM

say "job $job, start $((attempt + 1)), on $SLURM_JOB_NODELIST"
rm -f "$RUN_DIR/exit.json" "$RUN_DIR/agent.json"
if [[ -n ${SLURM_HET_SIZE:-} ]]; then
  give_up 78 "this is a heterogeneous job; every node must start the same number of ranks"
fi

# Start after start without a newer checkpoint leads nowhere, whatever the reason.
step=$(grep -s '"event": "checkpoint"' "$RUN_DIR/events.jsonl" | tail -n 1 | grep -o '"step": [0-9]\{1,15\}')
step=${step##* }
idle=0
if ((attempt > 0)) && read -r before idle_before 2>/dev/null <"$RUN_DIR/slurm-starts"; then
  [[ $before == "${step:-0}" && $idle_before =~ ^[0-9]{1,6}$ ]] && idle=$((idle_before + 1))
fi
echo "${step:-0} $idle" >"$RUN_DIR/slurm-starts"
if ((idle > MAX_REQUEUES)); then
  give_up 93 "it was started again $idle times in a row without a newer checkpoint"
fi

cd "$SLURM_SUBMIT_DIR" || give_up 78 "the folder that the job was submitted from is not there"
if [[ -n $SETUP ]]; then
  [[ $SETUP == /* ]] || SETUP=./$SETUP # never one on PATH
  set +u                               # it is the user's own, and need not be written for -u
  # shellcheck source=/dev/null
  source "$SETUP" || give_up 78 "the file of launcher.options.setup ended with an error"
  set -u
fi

arguments=("$RUN_DIR")
if ((NODES > 1)); then
  # Never this host's own idea of its name: each node would then meet with itself alone.
  hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST") || give_up 78 "scontrol does not tell the names of the nodes"
  [[ -n $hosts ]] || give_up 78 "the list of nodes is empty"
  # Another port for every start, and below those that the kernel gives away.
  arguments+=(--meet "${hosts%%$'\n'*}:$((20000 + (SLURM_JOB_ID + 37 * attempt) % 10000))")
fi
# Since 22.05 srun does not take it from sbatch; all ranks of a node would share one core.
[[ -z ${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

! cancelled || end_cancelled
# In a session of its own: on a signal to all of this script's processes srun would kill the agents at once.
# shellcheck disable=SC2016 # the node's number is known on the node alone
setsid "${SRUN[@]}" bash -c 'exec "$@" --node "$SLURM_NODEID"' agent "${AGENT[@]}" "${arguments[@]}" &
agents=$!
while :; do
  wait "$agents" # returns at each trap too
  code=$?
  kill -0 "$agents" 2>/dev/null || break
done

left=$(grep -so '"exit_code": [0-9]\{1,3\}' "$RUN_DIR/exit.json") && code=${left##* }
say "the agents ended with exit code $code"
! cancelled || end_cancelled
case $code in
  75 | 138 | 143) ;; # asked to stop, 75 after a save: another start goes on from the newest checkpoint
  70) lost_a_node || exit 70 ;;
  *) exit "$code" ;;
esac
# A job that Slurm has requeued, or somebody cancelled, is left alone: to requeue that one would bring it back.
if [[ $REQUEUE == yes ]] && still_ours; then
  scontrol requeue "$job" || say "it cannot be requeued here; go on with: unitrain resume $RUN_DIR"
fi
exit "$code"
