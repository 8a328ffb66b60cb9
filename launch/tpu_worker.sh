#!/usr/bin/env bash
# What launch/tpu_pod.sh runs on each worker of a TPU slice, in the checkout that it has put there.
#   install              Python, and this package with JAX for TPUs, into .venv
#   mount BUCKET DIR     a Cloud Storage bucket, unless something is mounted there
#   start COMMAND...     the command, in the checkout and by its .venv, apart from this connection: it outlives it
#   stop SECONDS         end what was started: SIGTERM, so that it saves, and after so many seconds SIGKILL, as what is left holds the TPU
#   status               prints `running`, or the command's exit code; 137 where it died without one
#   log [BYTES]          prints the command's output from that byte on; without a number its last lines, each with this worker's name
set -euo pipefail
usage="usage: launch/tpu_worker.sh install | mount BUCKET DIR | start COMMAND... | stop SECONDS | status | log [BYTES]"
root=$(cd "$(dirname "$0")/.." && pwd)
state=$HOME/icae_run # log, exit (the code, once there is one) and group (the process group's id)
group=$(cat "$state/group" 2>/dev/null || echo none)
alive() { pgrep -g "$group" -r D,R,S,T >/dev/null 2>&1; } # what has died and was not buried does not count

case ${1-} in
  install)
    cd "$root"
    PATH=$HOME/.local/bin:$PATH
    command -v uv >/dev/null || python3 -m pip install --user --quiet uv # the images' own Python is too old
    uv venv --allow-existing --python 3.11 .venv
    uv pip install --python .venv/bin/python --editable '.[tpu]'
    ;;
  mount)
    bucket=${2:?$usage} dir=${3:?$usage}
    ! mountpoint -q "$dir" || exit 0
    if ! command -v gcsfuse >/dev/null; then # https://cloud.google.com/storage/docs/cloud-storage-fuse/install
      key=/usr/share/keyrings/cloud.google.asc
      curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$key" >/dev/null
      echo "deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" | sudo tee /etc/apt/sources.list.d/gcsfuse.list
      sudo apt-get -o DPkg::Lock::Timeout=600 update && sudo apt-get -o DPkg::Lock::Timeout=600 install -y gcsfuse # a new VM updates itself first
    fi
    fusermount -uz "$dir" 2>/dev/null || true # what a dead gcsfuse leaves
    sudo mkdir -p "$dir" && sudo chown "$(id -un)" "$dir"
    # Without a metadata cache, so that a worker sees at once what another wrote; checkpoints are renamed folders.
    gcsfuse --implicit-dirs --rename-dir-limit=200000 --metadata-cache-ttl-secs=0 "$bucket" "$dir"
    ;;
  start)
    shift
    : "${1:?$usage}"
    mkdir -p "$state"
    rm -f "$state/exit"
    cd "$root"
    setsid bash "$root/launch/tpu_worker.sh" supervise "$@" >"$state/log" 2>&1 </dev/null &
    echo $! >"$state/group"
    ;;
  supervise)
    shift
    trap : TERM # the whole group gets it; this process stays to write the code down
    PATH=$root/.venv/bin:$PATH
    code=0
    "$@" || code=$?
    echo "$code" >"$state/exit.new" && mv "$state/exit.new" "$state/exit"
    ;;
  stop)
    seconds=${2:?$usage}
    alive || exit 0
    kill -TERM -- "-$group" || true
    while alive && ((SECONDS < seconds)); do sleep 0.2; done
    ! alive || kill -KILL -- "-$group" || true
    ;;
  status)
    running=yes
    alive || running='' # looked at first: a command that ends now has its code written
    if [[ -f $state/exit ]]; then cat "$state/exit"; elif [[ $running ]]; then echo running; else echo 137; fi
    ;;
  log)
    if [[ ${2-} ]]; then tail -c "+$(($2 + 1))" "$state/log"; else tail -n 20 "$state/log" | sed "s/^/$(hostname): /"; fi
    ;;
  *) echo "$usage" >&2 && exit 2 ;;
esac
