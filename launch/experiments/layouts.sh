#!/usr/bin/env bash
# Trains every position layout of both methods on the quickstart's base and data with 11 memory
# tokens, first AE, then AE and QA, with the same steps and seed, and prints the held-out losses.
#   launch/experiments/layouts.sh QUICKSTART OUT [STEPS]
# QUICKSTART: the workdir of `icae quickstart --full`, for its data. STEPS: of each phase, 200 by
# default.
set -euo pipefail
usage="usage: launch/experiments/layouts.sh QUICKSTART OUT [STEPS]"
quickstart=${1:?$usage} out=${2:?$usage} steps=${3:-200}
here=$(cd "$(dirname "$0")/../.." && pwd)

run() { # METHOD LAYOUT
  local dir=$out/$1-$2
  common=(
    --config.base="$here/icae_jax/data/tiny_base" --config.data.cache_dir="$out/cache"
    --config.data.train="$quickstart/data/train.jsonl"
    --config.data.eval="$quickstart/data/held_out.jsonl"
    --config.compression.k_choices="()" --config.compression.layout="$2"
    --config.steps="$steps" --config.eval_every=50
  )
  icae train --config "quickstart:pretrain-$1" --workdir "$dir/pretrain" "${common[@]}"
  icae train --config "quickstart:finetune-$1" --workdir "$dir/finetune" \
    --config.init_from="$dir/pretrain" "${common[@]}"
}

show() { # METRICS: the held-out losses with the text's own memory, by step
  grep eval_loss "$1" | sed -E '
    s/.*"step": ([0-9]+), "eval": \{"memory": \{([^}]*)\}.*/\1: \2;/
    s/([0-9]\.[0-9]{4})[0-9]*/\1/g' | tr -d '"' | tr '\n' ' '
}

pairs="icae:sequential icae:uniform icae:servable"
pairs+=" x500:sequential x500:uniform x500:clean x500:reference"
for pair in $pairs; do run "${pair%:*}" "${pair#*:}"; done
for pair in $pairs; do
  for phase in pretrain finetune; do
    printf '%s %s: ' "$pair" "$phase"
    show "$out/${pair%:*}-${pair#*:}/$phase/metrics.jsonl"
    echo
  done
done
