#!/usr/bin/env bash
# Install jaxft on every host of a TPU slice and train: scripts/tpu_vm.sh NAME ZONE configs/X.py /mnt/shared/run [--config.a.b=value ...]
# The workdir is on a disk that all hosts have mounted, such as a Filestore share. Run it again to continue after a preemption.
set -euo pipefail
name=$1 zone=$2 config=$3 workdir=$4
shift 4
gcloud compute tpus tpu-vm scp --recurse --worker=all --zone="$zone" . "$name":jaxft
gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="
  cd jaxft && python3 -m venv .venv && .venv/bin/pip install --quiet --editable '.[tpu]' &&
  .venv/bin/python -m jaxft.train --config $config --workdir $workdir $*"
