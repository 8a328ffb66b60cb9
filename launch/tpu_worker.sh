#!/usr/bin/env bash
# What launch/tpu_pod.sh runs on each worker of a TPU slice, in the checkout that it copied there.
#   install              installs Python, and this package with JAX for TPUs, in .venv
#   mount BUCKET DIR     mounts a Cloud Storage bucket, unless something is mounted there
#   start COMMAND...     starts the command in the checkout, with its .venv, detached from this
#                        connection
#   stop SECONDS         ends what was started: SIGTERM, so that it saves, and after that many
#                        seconds SIGKILL, since a process that is left would hold the TPU
#   status               prints `running` or the command's exit code; 137 if it died without one
#   log [BYTES]          prints the command's output from that byte on; without a number, its last
#                        lines, each with this worker's name
set -euo pipefail
usage="usage: launch/tpu_worker.sh install | mount BUCKET DIR | start COMMAND... | stop SECONDS
    | status | log [BYTES]"
root=$(cd "$(dirname "$0")/.." && pwd)
state=$HOME/icae_run # files: log, exit (the exit code) and group (the process group's id)
group=$(cat "$state/group" 2>/dev/null || echo none)
alive() { pgrep -g "$group" -r D,R,S,T >/dev/null 2>&1; } # zombies do not count

case ${1-} in
  install)
    cd "$root"
    PATH=$HOME/.local/bin:$PATH
    # The images' own Python is too old; uv brings one.
    command -v uv >/dev/null || python3 -m pip install --user --quiet uv
    uv venv --allow-existing --python 3.11 .venv
    uv pip install --python .venv/bin/python --editable '.[tpu]'
    ;;
  mount)
    bucket=${2:?$usage} dir=${3:?$usage}
    ! mountpoint -q "$dir" || exit 0
    # https://cloud.google.com/storage/docs/cloud-storage-fuse/install
    if ! command -v gcsfuse >/dev/null; then
      key=/usr/share/keyrings/cloud.google.asc packages=https://packages.cloud.google.com/apt
      curl -fsSL "$packages/doc/apt-key.gpg" | sudo tee "$key" >/dev/null
      echo "deb [signed-by=$key] $packages gcsfuse-$(lsb_release -cs) main" |
        sudo tee /etc/apt/sources.list.d/gcsfuse.list
      wait=(-o DPkg::Lock::Timeout=600) # a new VM updates itself first
      sudo apt-get "${wait[@]}" update && sudo apt-get "${wait[@]}" install -y gcsfuse
    fi
    fusermount -uz "$dir" 2>/dev/null || true # the mount of a gcsfuse that has died
    sudo mkdir -p "$dir" && sudo chown "$(id -un)" "$dir"
    # No metadata cache, so that a worker sees at once what another wrote. Checkpoints are folders
    # that are renamed.
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
    trap : TERM # the whole group gets SIGTERM; this process stays to write the exit code
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
    alive || running='' # first, since a command that ends after this has written its exit code
    if [[ -f $state/exit ]]; then
      cat "$state/exit"
    elif [[ $running ]]; then
      echo running
    else
      echo 137
    fi
    ;;
  log)
    if [[ ${2-} ]]; then
      tail -c "+$(($2 + 1))" "$state/log"
    else
      tail -n 20 "$state/log" | sed "s/^/$(hostname): /"
    fi
    ;;
  --help | -h) echo "$usage" ;;
  *) echo "$usage" >&2 && exit 2 ;;
esac
