#!/usr/bin/env bash
# Everything that only a GPU can show, with time: bash benchmarks/gpu.sh
#
# All parts of benchmarks/gpu_parts.py without a deadline and in three turns, an hour or two on one large card, then the tables
# into docs/benchmarks.md. What it needs, where results go, and variables such as PARTS: see benchmarks/gpu_short.sh.
set -uo pipefail
[ "${GPU_TINY:-0}" = 0 ] && GPU_TINY=
export OUT=${OUT:-runs/gpu${GPU_TINY:+-tiny}} TURNS=${TURNS:-3}
bash "$(dirname "$0")/gpu_short.sh" all 0
code=$?
export PYTHONPATH=${TMPDIR:-/tmp}/jaxft-gpu-$(id -u)/site${PYTHONPATH:+:$PYTHONPATH} # as gpu_short.sh has it
[ $code -le 1 ] && [ -z "${GPU_TINY:-}" ] && "${PYTHON:-python3}" "$(dirname "$0")/gpu_tables.py" "$OUT"
exit $code
