#!/usr/bin/env bash
# Train both models of the comparison at once on one GPU: bash benchmarks/comparison/train_all.sh [folder] [minutes] [device] [more options]
# Run it from the repository root. It fails only if a model could not be trained; how much one recalls stands in its facts.
set -euo pipefail
out=${1:-benchmarks/comparison/weights}
minutes=${2:-3}
device=${3:-cuda}
shift $(($# < 3 ? $# : 3))
mkdir -p "$out"
export HF_HUB_OFFLINE=1
status=0
jobs=()
for model in transformer mamba; do
  "${PYTHON:-python}" -m benchmarks.comparison.train --model "$model" --device "$device" --minutes "$minutes" --out "$out" "$@" \
    > >(tee "$out/$model.log") 2>&1 &
  jobs+=($!)
done
for job in "${jobs[@]}"; do wait "$job" || status=1; done
exit $status
