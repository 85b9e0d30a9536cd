#!/usr/bin/env bash
# One process a node: sbatch --nodes=4 --gpus-per-node=8 scripts/slurm.sh configs/X.py /shared/run [--config.a.b=value ...]
#SBATCH --job-name=jaxft
#SBATCH --ntasks-per-node=1
#SBATCH --signal=SIGUSR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
# 300 s before the time is up every process gets SIGUSR1, saves and exits with 75; the job is then queued again and continues.
# A slow disk needs longer: GPT-J with AdamW is 73 GB. The number is above, and in --wait.
set -uo pipefail
config=$1 workdir=$2
shift 2
newest() { ls "$workdir/checkpoints" 2>/dev/null | grep -E '^[0-9]+$' | sort -n | tail -n 1; }
before=$(newest)
srun --kill-on-bad-exit=0 --wait=300 python -m jaxft.train --config "$config" --workdir "$workdir" "$@"
code=$?  # the largest of all processes': 137 where one was killed or was frozen until --wait was over, 5 of the others
# Again, as long as the run gets on; and twenty times without, as what ended it may end it again.
if [ "$code" = 75 ] || [ "$code" = 5 ] || [ "$code" = 137 ]; then
  if [ "$(newest)" != "$before" ] || [ "${SLURM_RESTART_COUNT:-0}" -lt 20 ]; then
    scontrol requeue "$SLURM_JOB_ID"
  fi
fi
exit "$code"
