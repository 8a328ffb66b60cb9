#!/usr/bin/env bash
# The three position layouts side by side on the quickstart's base and data: held-out AE loss at equal steps and seeds.
#   launch/layouts.sh QUICKSTART OUT [STEPS]
# QUICKSTART: the workdir of `icae quickstart` (its data is used).
set -euo pipefail
quickstart=${1:?usage: launch/layouts.sh QUICKSTART OUT [STEPS]} out=${2:?usage: launch/layouts.sh QUICKSTART OUT [STEPS]} steps=${3:-200}
here=$(cd "$(dirname "$0")/.." && pwd)
for layout in sequential uniform servable; do
  icae train --config "$here/configs/quickstart.py:pretrain" --workdir "$out/$layout" \
    --config.base="$here/icae_jax/data/tiny_base" --config.compression.layout="$layout" --config.steps="$steps" --config.eval_every=50 \
    --config.data.train="$quickstart/data/train.jsonl" --config.data.eval="$quickstart/data/held_out.jsonl" --config.data.cache_dir="$out/cache"
done
for layout in sequential uniform servable; do
  echo "$layout: $(grep eval_loss "$out/$layout/metrics.jsonl" | sed -E 's/.*"step": ([0-9]+).*"memory": \{"ae": ([0-9.]{6}).*/step \1: \2;/' | tr '\n' ' ')"
done
