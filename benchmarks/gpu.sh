#!/usr/bin/env bash
# Everything that only a GPU can show, one after the other: bash benchmarks/gpu.sh
#
# Needs one GPU, and torch (built for it), transformers and accelerate beside jaxft. Nothing is downloaded: weights are random.
# Tables go into docs/benchmarks.md as they are done; what fails, or has no room on this card, is named at the end, and the rest
# runs. An hour or two on one large card; MODELS=gpt2 TURNS=1 bash benchmarks/gpu.sh trains the smallest only, once. Without a GPU
# the same commands run on the CPU, with gpt2 alone and small batches.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
failed=()
run() {
  echo "--- python $*"
  "$python" "$@" || failed+=("python $*")
}

backend=$("$python" -c 'import jax; print(jax.default_backend())')
if [ "$backend" != gpu ] && nvidia-smi >/dev/null 2>&1; then
  echo "error: there is a GPU, and JAX computes on the $backend: pip install 'jax[cuda13]'"
  exit 2
fi

if [ "$backend" = gpu ]; then
  run benchmarks/attention.py --rows 8
  for model in ${MODELS:-gpt2 gpt2-medium gpt2-xl EleutherAI/gpt-j-6b}; do
    case $model in
      gpt2) how="--rows 16 --length 1024 --steps 100 --remat none" ;;
      gpt2-medium) how="--rows 16 --length 1024 --steps 50 --remat none" ;;
      gpt2-xl) how="--rows 8 --length 1024 --steps 20 --remat dots" ;;
      *) how="--rows 4 --length 2048 --steps 10 --remat full --checkpointing" ;; # Trainer has no room for it otherwise
    esac
    run benchmarks/train.py --model "$model" --warm_up 5 --turns "${TURNS:-3}" $how
  done
  run benchmarks/gaps.py --rows 16 --length 1024 --dropout 0
  run benchmarks/generate.py
  run benchmarks/plan_vs_measured.py
  run benchmarks/offload.py # GPT-J-6B in 8 GiB
else
  run benchmarks/attention.py
  run benchmarks/train.py
  run benchmarks/gaps.py
  run benchmarks/generate.py
  run benchmarks/plan_vs_measured.py
  run benchmarks/offload.py --model gpt2 --length 512 --steps 3
fi

for command in "${failed[@]}"; do
  echo "failed: $command"
done
[ ${#failed[@]} -eq 0 ]
