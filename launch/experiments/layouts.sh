#!/usr/bin/env bash
# Every position layout of both methods on the quickstart's base and data, 11 memory tokens: held-out AE, then QA, at equal steps and seeds.
#   launch/experiments/layouts.sh QUICKSTART OUT [STEPS]
# QUICKSTART: the workdir of `icae quickstart --full` (its data is used). STEPS: of each phase, 200 by default.
set -euo pipefail
usage="usage: launch/experiments/layouts.sh QUICKSTART OUT [STEPS]"
quickstart=${1:?$usage} out=${2:?$usage} steps=${3:-200}
here=$(cd "$(dirname "$0")/../.." && pwd)

run() { # METHOD LAYOUT
  common=(
    --config.base="$here/icae_jax/data/tiny_base" --config.compression.k_choices="()" --config.compression.layout="$2"
    --config.steps="$steps" --config.eval_every=50 --config.data.cache_dir="$out/cache"
    --config.data.train="$quickstart/data/train.jsonl" --config.data.eval="$quickstart/data/held_out.jsonl"
  )
  icae train --config "quickstart:pretrain-$1" --workdir "$out/$1-$2/pretrain" "${common[@]}"
  icae train --config "quickstart:finetune-$1" --workdir "$out/$1-$2/finetune" --config.init_from="$out/$1-$2/pretrain" "${common[@]}"
}

show() { # METRICS: the held-out losses of right memories, step by step
  grep eval_loss "$1" | sed -E 's/.*"step": ([0-9]+), "eval": \{"memory": \{([^}]*)\}.*/\1: \2;/; s/([0-9]\.[0-9]{4})[0-9]*/\1/g' | tr -d '"' | tr '\n' ' '
}

pairs="icae:sequential icae:uniform icae:servable x500:sequential x500:uniform x500:clean x500:reference"
for pair in $pairs; do run "${pair%:*}" "${pair#*:}"; done
for pair in $pairs; do
  for phase in pretrain finetune; do
    printf '%s %s: ' "$pair" "$phase"
    show "$out/${pair%:*}-${pair#*:}/$phase/metrics.jsonl"
    echo
  done
done
