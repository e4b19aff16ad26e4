#!/usr/bin/env bash
# Trains on the nodes of a Slurm job; goes on by itself after a preemption or the end of its time.
#
#   sbatch [--nodes 4 ...] scripts/launch_slurm.sh CONFIG OUT [overrides of jaxllm train]
#   sbatch scripts/launch_slurm.sh configs/llama_1b.py /shared/runs/one --mesh fsdp=16
#
# Run it from the checkout. OUT and the data lie on a file system that all nodes share. The mesh
# must name all devices: nodes x GPUs of a node. Options given to sbatch win over these:
#
# One process a node, which takes all its GPUs. One process a GPU works as well:
# --ntasks-per-node=8 (jaxllm reads from Slurm's variables which GPU is whose).
#SBATCH --job-name=jaxllm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
# SIGTERM to the processes (not to this script) 300 s before the time is up: they save and exit 0.
#SBATCH --signal=TERM@300
# After a preemption or a dead node the job goes back to the queue, and resumes from OUT.
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=jaxllm-%j.log
set -euo pipefail

if [ $# -lt 2 ] || [ -z "${SLURM_JOB_ID-}" ]; then
    echo "usage: sbatch scripts/launch_slurm.sh CONFIG OUT [overrides]" >&2
    exit 2
fi
config=$1 out=$2
shift 2

# Slurm runs a copy of this script from its spool folder: the checkout is where sbatch was called.
cd "${SLURM_SUBMIT_DIR:-.}"
jaxllm=jaxllm
if [ -x .venv/bin/jaxllm ]; then jaxllm=$PWD/.venv/bin/jaxllm; fi

# A preemption may tell this shell too: it has to stay until srun's processes have saved.
trap : TERM

# --kill-on-bad-exit: when one process fails, the others wait for it inside a step: end them.
# --wait: the same 60 s after the first has ended well. The coordinator is found by jax: the first
# node, at a port that depends on the job's number.
status=0
srun --kill-on-bad-exit=1 --wait=60 "$jaxllm" train "$config" --out "$out" "$@" || status=$?

# Ended well but not finished: it was told to stop. Back to the queue, as long as a checkpoint shows
# that there was something to save.
if [ "$status" -eq 0 ] && [ ! -e "$out/model/config.json" ]; then
    if [ -n "$(ls -A "$out/checkpoints" 2>/dev/null)" ]; then
        echo "launch_slurm: stopped before the last step; back to the queue" >&2
        scontrol requeue "$SLURM_JOB_ID"
    fi
fi
exit "$status"
