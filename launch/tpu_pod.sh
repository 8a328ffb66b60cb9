#!/usr/bin/env bash
# Runs one command on every worker of a TPU slice until it is done. Creates or queues the slice,
# installs this checkout's last commit, starts the command and follows worker 0's log. After a
# preemption or a crash it starts the command again, on a new slice if the old one is gone. At the
# end it deletes the slice.
#   launch/tpu_pod.sh --name icae --zone us-west4-a --type v5litepod-16 --spot --queued \
#     --mount BUCKET:/mnt/runs -- icae train --config icae:llama2_7b --workdir /mnt/runs/llama2
# The same command continues on a slice that exists. Workers share only what is mounted: --workdir
# must be there, and so must a sweep's job files (-- bash /mnt/runs/jobs/point-000.sh). Environment
# variables: -- env HF_TOKEN=... icae train ...; their values are not shown.
# Needs gcloud, logged in, with its key in the ssh agent: ssh-add ~/.ssh/google_compute_engine.
# Exit codes: the command's 0, 2 and 3, or its last one when it is given up; 2 for bad arguments
# here; 1 if no slice could be created.
set -euo pipefail
usage="usage: launch/tpu_pod.sh --name NAME --zone ZONE --type TYPE [flags] -- COMMAND...
  --type TYPE           the slice: v5litepod-16, v6e-64, v5p-128, v4-32, ...
  --version VERSION     TPU software (default: the one for JAX on this type)
  --project PROJECT     (default: gcloud's)
  --spot                use capacity that can be taken back at any time
  --queued              wait for capacity in Google's queue; otherwise creating is tried repeatedly
  --mount BUCKET:/DIR   mount a Cloud Storage bucket there on all workers; use one with a
                        hierarchical namespace, where renaming is atomic
  --keep                do not delete the slice at the end
  --max_restarts N      (default: 100)
  --poll SECONDS        how often to ask the workers (default: 30)
  --grace SECONDS       grace period for the other workers to exit when one has failed, and for a
                        stopped one to save (default: 120)
  --dry_run             run nothing; print the commands of a run with an exit 75 and a preemption"

dry_run='' # then the printed lines are commands or, from say, comments
say() { if [[ $dry_run ]]; then echo "# $*"; else echo "tpu_pod: $*" >&2; fi; }
bad() { echo "tpu_pod: $*" >&2 && exit 2; }

name='' zone='' type='' version='' project='' mount='' spot='' queued='' keep=''
max_restarts=100 poll=30 grace=120
case ${1-} in
  --help | -h) echo "$usage" && exit 0 ;;
  '') echo "$usage" >&2 && exit 2 ;;
esac
while [[ $# -gt 0 && $1 != -- ]]; do
  case $1 in
    --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
    --name | --zone | --type | --version | --project | --mount | --max_restarts | --poll | --grace)
      [[ $# -gt 1 && ${2:0:2} != -- ]] || bad "$1 needs a value"
      printf -v "${1#--}" %s "$2"
      shift 2
      ;;
    --spot | --queued | --keep | --dry_run | --dry-run)
      flag=${1#--}
      printf -v "${flag//-/_}" yes
      shift
      ;;
    *) bad "unknown argument ${1%%=*}; flags come first, then -- and the command" ;;
  esac
done
[[ $# -gt 1 ]] ||
  bad "no command; give it behind --, e.g. -- icae train --config FILE --workdir DIR"
shift
[[ ! $1 =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] ||
  bad "the command begins with a variable, ${1%%=*}; write -- env NAME=VALUE... COMMAND..."
for flag in name zone type; do [[ ${!flag} ]] || bad "--$flag is missing"; done
[[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] ||
  bad "--name is $name; small letters, digits and dashes, a letter first"
[[ $max_restarts =~ ^[0-9]+$ ]] || bad "--max_restarts is $max_restarts; give a whole number"
[[ $poll =~ ^[0-9]+(\.[0-9]+)?$ ]] || bad "--poll is $poll; give seconds"
[[ $grace =~ ^[0-9]+$ ]] || bad "--grace is $grace; give whole seconds"
mount=${mount#gs://}
[[ -z $mount || $mount =~ ^[^:/]+:/[^:]+$ ]] ||
  bad "--mount is $mount; give BUCKET:/DIR, e.g. my-runs:/mnt/runs"
if [[ -z $version ]]; then
  case $type in # https://cloud.google.com/tpu/docs/runtimes
    v6e-*) version=v2-alpha-tpuv6e ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    v[234]-*) version=tpu-ubuntu2204-base ;;
    *) bad "--type is $type, whose software is not known here; name it by --version" ;;
  esac
fi
here=$(cd "$(dirname "$0")/.." && pwd)
[[ $dry_run ]] || git -C "$here" diff --quiet HEAD ||
  bad "$here is no git checkout or has changes that are not committed;" \
    "the workers get its last commit, so commit them"

where=(--zone="$zone")
[[ -z $project ]] || where+=(--project="$project")
slice=(gcloud compute tpus tpu-vm)
create=("${slice[@]}" create "$name" "${where[@]}" --accelerator-type="$type" --version="$version")
delete=("${slice[@]}" delete "$name" "${where[@]}" --quiet)
if [[ $queued ]]; then
  queue=(gcloud compute tpus queued-resources)
  create=("${queue[@]}" create "$name" --node-id="$name" "${where[@]}")
  create+=(--accelerator-type="$type" --runtime-version="$version")
  delete=("${queue[@]}" delete "$name" "${where[@]}" --force --quiet)
fi
[[ -z $spot ]] || create+=(--spot)
# gcloud tries ten times to reach a worker. Without a timeout, a worker that is gone would cost half
# an hour.
ssh=("${slice[@]}" ssh "$name" "${where[@]}" --quiet)
ssh+=(--ssh-flag=-oConnectTimeout=20 --ssh-flag=-oServerAliveInterval=20)

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
interrupted() {
  say "interrupted. The slice $name stays, with what runs on it," \
    "and is paid for until it is deleted:"
  echo "${delete[*]}" >&2
  exit 130
}
trap interrupted INT TERM HUP

# --------------------------------------------------------------------------------- running commands

quoted() { # prints the words so that a shell reads them back
  local line
  printf -v line '%q ' "$@"
  echo "${line% }"
}
run() {
  if [[ $dry_run ]]; then quoted "$@"; else echo "+ $(quoted "$@")" >&2 && "$@"; fi
}
hide() { # sets hidden to the words without the values of variables and of flags that look secret
  local word next='' secret='token|secret|passwo?r?d|passphrase|credentials?|authorization'
  secret="($secret|(^|[^a-z]|api)key)([_-][a-z0-9_-]*)?"
  local variable='^[A-Za-z_][A-Za-z0-9_]*=' login='://[^/@[:space:]]*@'
  local within="${secret}[\"']?[=:]" flag="^--?[a-z0-9_.-]*${secret}\$"
  hidden=()
  shopt -s nocasematch
  for word in "$@"; do
    if [[ $next ]]; then
      word='HIDDEN' next=''
    elif [[ $word =~ $variable || $word =~ $within ]]; then
      word="${word%%"${BASH_REMATCH[0]}"*}${BASH_REMATCH[0]}HIDDEN"
    elif [[ $word =~ $login ]]; then
      word="${word%%://*}://HIDDEN"
    elif [[ $word =~ $flag ]]; then
      next=yes
    fi
    hidden+=("$word")
  done
  shopt -u nocasematch
}
run_on() { # like run, for the words that `on` has made
  if [[ $dry_run ]]; then
    quoted "${shown[@]}"
  else
    echo "+ $(quoted "${shown[@]}")" >&2 && "${words[@]}"
  fi
}
# The answers in a dry run: no slice; exit 75 of the first attempt; no answer of the second, whose
# slice is gone; 0 of the third.
answers=(NOT_FOUND READY 75 FAILS PREEMPTED NOT_FOUND READY 0)
if [[ $queued ]]; then
  answers=(NOT_FOUND PROVISIONING ACTIVE READY 75 FAILS SUSPENDED NOT_FOUND ACTIVE READY 0)
fi
ask() { # sets answer to what the command prints; false if it fails, with its error in $tmp/err
  if [[ -z $dry_run ]]; then
    answer=$("$@" 2>"$tmp/err")
  else
    quoted "$@"
    answer=${answers[0]} answers=("${answers[@]:1}")
    [[ $answer != FAILS ]]
  fi
}
pause() { # sleeps for a number of polls
  for ((i = 0; i < $1; i++)); do
    if [[ $dry_run ]]; then quoted sleep "$poll"; else sleep "$poll"; fi
  done
}
on() { # WORKER ARGUMENTS: sets words to a call of tpu_worker.sh there, shown to how it may be shown
  local script=(bash icae_jax/launch/tpu_worker.sh)
  words=("${ssh[@]}" --worker="$1" --command="$(quoted "${script[@]}" "${@:2}")")
  hide "${@:2}"
  shown=("${ssh[@]}" --worker="$1" --command="$(quoted "${script[@]}" "${hidden[@]}")")
}

# ---------------------------------------------------------------------------------------- the slice

describe() { # KIND FIELD: sets answer to its state
  ask gcloud compute tpus "$1" describe "$name" "${where[@]}" --format="value($2)" && return
  if grep -q NOT_FOUND "$tmp/err"; then answer=NOT_FOUND; else answer=UNKNOWN; fi
}
# Sets state: READY, NOT_FOUND, WAITING (it will change), LOST (to be deleted) or UNKNOWN (gcloud
# could not say).
find_state() {
  answer=ACTIVE
  [[ -z $queued ]] || describe queued-resources state.state
  if [[ $answer == ACTIVE ]]; then
    describe tpu-vm state
    [[ -z $queued || $answer != NOT_FOUND ]] || answer=PREEMPTED
  fi
  case $answer in
    READY | NOT_FOUND) state=$answer ;;
    PREEMPTED | TERMINATED | SUSPENDED | FAILED) state=LOST ;;
    ACCEPTED | WAITING_FOR_RESOURCES | PROVISIONING | CREATING | STARTING) state=WAITING ;;
    RESTARTING | REIMAGING | REPAIRING | STOPPING | SUSPENDING | DELETING) state=WAITING ;;
    UNKNOWN)
      [[ $started ]] || { cat "$tmp/err" >&2 && exit 1; }
      say "gcloud does not say how the slice is"
      state=UNKNOWN
      ;;
    *) say "the slice $name is ${answer:-in no known state}; start it or delete it" && exit 1 ;;
  esac
}

acquire() { # waits until the slice is READY; false if it could not be created this time
  local created=''
  while [[ $state != READY ]]; do
    case $state in
      NOT_FOUND)
        [[ -z $created ]] || return 1
        created=yes installed=''
        run "${create[@]}" || return 1
        ;;
      LOST) run "${delete[@]}" || pause 1 ;;
      *) pause 1 ;;
    esac
    find_state
  done
}

install() { # once on a slice
  [[ -z $installed ]] || return 0
  local unpack="mkdir -p icae_jax && tar -xzf icae_jax.tar.gz -C icae_jax"
  run git -C "$here" archive --format=tar.gz --output="$tmp/icae_jax.tar.gz" HEAD &&
    run "${slice[@]}" scp "$tmp/icae_jax.tar.gz" "$name:" "${where[@]}" --quiet --worker=all &&
    run "${ssh[@]}" --worker=all \
      --command="$unpack && bash icae_jax/launch/tpu_worker.sh install" &&
    installed=yes
}

# -------------------------------------------------------------------------------------- the command

start() { # starts the command on all workers, after stopping an earlier one
  on all stop "$grace" && run_on || return 1
  if [[ $mount ]]; then on all mount "${mount%%:*}" "${mount#*:}" && run_on || return 1; fi
  on all start "$@" && run_on || return 1
  seen=0 started=yes
}

follow() { # prints what worker 0 has logged since the last time
  on 0 log "$seen"
  if [[ $dry_run ]]; then run_on && return; fi
  "${words[@]}" >"$tmp/log" 2>/dev/null || return 0
  cat "$tmp/log"
  seen=$((seen + $(wc -c <"$tmp/log")))
}

# Waits until all workers have exited. Sets code to the first of 2, 3, a crash, 75, 0 that one of
# them exited with, or to 1 if they are lost.
await() {
  local unanswered=0 failed_at='' running codes
  while pause 1; do
    on all status
    if ! ask "${words[@]}" || ! codes=$(grep -E '^(running|[0-9]+)$' <<<"$answer"); then
      code=1
      find_state
      [[ $state == READY || $state == UNKNOWN ]] || return 0
      [[ $state == READY ]] || continue
      unanswered=$((unanswered + 1))
      say "a worker does not answer ($unanswered of 10 times)"
      if ((unanswered == 10)); then state=LOST && return 0; fi
      continue
    fi
    unanswered=0 running='' code=0
    follow
    for worker in $codes; do
      case $worker in
        running) running=yes ;;
        2 | 3) code=$worker ;;
        75) [[ $code != 0 ]] || code=75 ;;
        0) ;;
        *) [[ $code == [23] ]] || code=$worker ;;
      esac
    done
    [[ $running ]] || return 0
    [[ $code == 0 ]] || failed_at=${failed_at:-$SECONDS}
    if [[ $failed_at ]] && ((SECONDS - failed_at >= grace)); then return 0; fi
  done
}

finish() { # CODE
  if [[ $keep ]]; then
    on all stop "$grace"
    [[ $state != READY ]] || run_on || true
    say "the slice $name stays, and is paid for until it is deleted: ${delete[*]}"
  elif [[ $state != NOT_FOUND ]]; then
    run "${delete[@]}" ||
      say "the slice $name could not be deleted, and is paid for until it is: ${delete[*]}"
  fi
  say "exit code $1"
  exit "$1"
}

installed='' started='' restarts=0 failures=0 # failures: in a row, each soon after its start
find_state
while :; do
  code=1 began=$SECONDS
  if acquire && install && start "$@"; then await; else find_state; fi
  case $code in
    0 | 2 | 3) finish "$code" ;;
    75) failures=0 ;;
    *)
      ((SECONDS - began < 600)) || failures=0
      failures=$((failures + 1))
      on all log # the last lines of each: the cause need not be worker 0's
      [[ $state != READY || -z $started ]] || run_on || true
      ;;
  esac
  if ((restarts == max_restarts)); then
    say "$restarts restarts are all that --max_restarts allows" && finish "$code"
  elif [[ -z $started ]] && ((failures == 3)); then
    say "the command could not be started, three times" && finish "$code"
  elif [[ $state == READY ]] && ((failures >= 6)); then
    say "six failures in a row, each within ten minutes" && finish "$code"
  fi
  restarts=$((restarts + 1))
  say "exit code $code, the slice is $state: restart $restarts"
  ((failures == 0)) || pause $((failures < 6 ? 2 ** (failures - 1) : 20))
done
