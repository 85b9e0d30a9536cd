#!/usr/bin/env bash
# Install jaxft on every host of a TPU slice and train: scripts/tpu_vm.sh NAME ZONE configs/X.py /mnt/shared/run [--config.a.b=value ...]
# The workdir is on a disk that all hosts have mounted, such as a Filestore share. What is committed here is what is copied. Run
# it again to continue after a preemption.
set -euo pipefail
name=$1 zone=$2 config=$3 workdir=$4
shift 4
archive=$(mktemp --suffix=.tar.gz)
trap 'rm -f "$archive"' EXIT
git archive --format=tar.gz --output="$archive" HEAD
gcloud compute tpus tpu-vm scp --worker=all --zone="$zone" "$archive" "$name":jaxft.tar.gz
arguments=$(printf '%q ' --config "$config" --workdir "$workdir" "$@")
gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="
  mkdir -p jaxft && tar -xzf jaxft.tar.gz -C jaxft && cd jaxft &&
  python3 -m pip install --quiet --user uv && python3 -m uv venv --quiet --allow-existing --python 3.12 ~/jaxft-venv &&
  python3 -m uv pip install --quiet --python ~/jaxft-venv/bin/python --editable '.[tpu]' &&
  ~/jaxft-venv/bin/python -m jaxft.train $arguments"
