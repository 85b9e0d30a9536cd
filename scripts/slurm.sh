#!/usr/bin/env bash
# One process a node: sbatch --nodes=4 --gpus-per-node=8 scripts/slurm.sh configs/X.py /shared/run [--config.a.b=value ...]
#SBATCH --job-name=jaxft
#SBATCH --ntasks-per-node=1
#SBATCH --signal=SIGUSR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
# 120 s before the time is up every process gets SIGUSR1, saves and exits with 75; the job is then queued again and continues.
set -uo pipefail
config=$1 workdir=$2
shift 2
# JAX gives a task one GPU unless it is told which are its own.
export JAX_LOCAL_DEVICE_IDS=${JAX_LOCAL_DEVICE_IDS:-$(seq -s, 0 $((${SLURM_GPUS_ON_NODE:-1} - 1)))}
srun --kill-on-bad-exit=0 --wait=120 python -m jaxft.train --config "$config" --workdir "$workdir" "$@"
code=$?
# A process that is lost may be lost again, or hide what ended it: its output says so. Twenty times are enough.
if [ "$code" = 75 ] || { [ "$code" = 5 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 20 ]; }; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
