#!/usr/bin/env bash
# Trains on a Cloud TPU slice: makes it if it is not there, copies this checkout, runs on all hosts.
#
#   ZONE=us-east5-a TYPE=v5litepod-16 SHARE=10.0.0.2:/runs \
#       scripts/tpu_vm.sh NAME CONFIG [overrides of jaxllm train]
#   ZONE=us-east5-a TYPE=v5litepod-16 SHARE=10.0.0.2:/runs \
#       scripts/tpu_vm.sh slice-1 configs/llama_1b.py --data /mnt/shared/text --mesh fsdp=16
#
# The same line again resumes. The run lies in /mnt/shared/NAME; the mesh names all chips.
#   ZONE     of the slice
#   TYPE     accelerator type
#   SHARE    NFS export that all hosts mount at /mnt/shared (Filestore): checkpoints are written by
#            all of them into one folder. Empty on a slice of one host: then it is a local folder
#   VERSION  image (tpu-ubuntu2204-base)
#   SPOT     1 for a spot slice
# The project is gcloud's own. Afterwards: gcloud compute tpus tpu-vm delete NAME --zone=ZONE
set -euo pipefail

die() { echo "tpu_vm: $*" >&2; exit 2; }
[ $# -ge 2 ] || die "usage: ZONE=... TYPE=... scripts/tpu_vm.sh NAME CONFIG [overrides]"
name=$1 config=$2
shift 2
: "${ZONE:?tpu_vm: set ZONE, for example us-east5-a}"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -e "$config" ] || die "$config: no such file in the checkout"

tpu() { gcloud compute tpus tpu-vm "$@" --zone="$ZONE"; }
everywhere() { tpu ssh "$name" --worker=all --command="$1"; }

if ! tpu describe "$name" >/dev/null 2>&1; then
    : "${TYPE:?tpu_vm: $name is not there; set TYPE to make it, for example v5litepod-16}"
    spot=()
    if [ "${SPOT-}" = 1 ]; then spot=(--spot); fi
    tpu create "$name" --accelerator-type="$TYPE" --version="${VERSION:-tpu-ubuntu2204-base}" \
        ${spot[@]+"${spot[@]}"}
fi

# The committed state, to every host.
archive=$(mktemp --suffix=.tar.gz)
trap 'rm -f "$archive"' EXIT
git archive --format=tar.gz --output="$archive" HEAD
tpu scp "$archive" "$name:jaxllm.tar.gz" --worker=all

mount="sudo mkdir -p /mnt/shared && sudo chmod 777 /mnt/shared"
if [ -n "${SHARE-}" ]; then
    mount="(mountpoint -q /mnt/shared || { sudo apt-get install -qq -y nfs-common && \
sudo mkdir -p /mnt/shared && sudo mount -t nfs $(printf %q "$SHARE") /mnt/shared; })"
fi
# scripts/setup finds Python 3.12 or lets uv bring it.
everywhere "set -e; $mount
mkdir -p jaxllm && tar -xzf jaxllm.tar.gz -C jaxllm
command -v uv >/dev/null || python3 -m pip install --quiet --user uv
PATH=\$HOME/.local/bin:\$PATH jaxllm/scripts/setup tpu"

# All hosts run the same line; jax reads from the slice's metadata which of them is which. exec: a
# SIGTERM to what ssh started reaches the run itself, which saves and ends.
printf -v line '%q ' .venv/bin/jaxllm train "$config" --out "/mnt/shared/$name" "$@"
everywhere "cd jaxllm && exec env JAXLLM_CLUSTER=tpu $line"
