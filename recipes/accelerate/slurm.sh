#!/bin/bash
# One machine with eight GPUs, an hour at a time: a run that is not finished by then puts itself into the queue again.
#   sbatch recipes/accelerate/slurm.sh recipes/sraven/hyla.yaml runs/sraven-hyla
#SBATCH --job-name=hyla
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=01:00:00
#SBATCH --open-mode=append
#SBATCH --requeue
set -e

recipe=$1
run=$2

# `set -e` ends the job if there is an error, since a repeated run would fail again.
srun accelerate launch --config_file recipes/accelerate/ddp.yaml \
  -m hf_hyla train "$recipe" --output "$run" --max-minutes 50
if [ ! -e "$run/run.json" ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
