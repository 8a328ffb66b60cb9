#!/usr/bin/env bash
# Trains on a small real base and real text, a few CPU minutes a phase: AE + LM on TinyStories, then
# QA on FairytaleQA.
#   launch/experiments/stories.sh DATA OUT [RATE] [METHOD]
# DATA: a folder with stories260K/ (model-hub format), tinystories/{train,valid}.jsonl.gz and
# fairytaleqa/{train,valid}.jsonl.gz. RATE: text tokens per memory token, 4 by default. METHOD: icae
# (the default) or x500. The losses are in metrics.jsonl of OUT/pretrain and OUT/finetune.
set -euo pipefail
usage="usage: launch/experiments/stories.sh DATA OUT [RATE] [METHOD]"
data=${1:?$usage} out=${2:?$usage} rate=${3:-4} method=${4:-icae}

common=(
  --config.base="$data/stories260K" --config.dtype=float32 --config.remat=none --config.unroll=5
  --config.compression.method="$method" --config.compression.layout=""
  --config.compression.trigger=trained
  --config.compression.k=$((32 / rate)) --config.compression.rate="$rate"
  --config.lora.rank=32 --config.lora.dropout=0.0
  --config.lora.targets="('q_proj','k_proj','v_proj','o_proj','gate_proj','up_proj','down_proj')"
  --config.optimizer.warmup_steps=50 --config.optimizer.schedule=cosine
  --config.optimizer.weight_decay=0.0
  --config.batch_size=32 --config.log_every=20 --config.data.cache_dir="$out/cache"
)

icae train --config icae:pretrain --workdir "$out/pretrain" "${common[@]}" \
  --config.data.train="$data/tinystories/train.jsonl.gz" \
  --config.data.eval="$data/tinystories/valid.jsonl.gz" \
  --config.data.context_lengths="(32,64)" --config.data.context_weights="(0.5,0.5)" \
  --config.optimizer.learning_rate=3e-3 --config.steps=1000 \
  --config.eval_every=250 --config.checkpoint_every=250

icae train --config icae:finetune --workdir "$out/finetune" "${common[@]}" \
  --config.init_from="$out/pretrain" \
  --config.data.train="$data/fairytaleqa/train.jsonl.gz" \
  --config.data.eval="$data/fairytaleqa/valid.jsonl.gz" \
  --config.data.context_lengths="(256,512)" --config.data.context_weights="()" \
  --config.batch_size=8 --config.data.max_target_tokens=96 \
  --config.optimizer.learning_rate=2e-3 --config.steps=200 \
  --config.eval_every=100 --config.eval_examples=128 --config.checkpoint_every=100
