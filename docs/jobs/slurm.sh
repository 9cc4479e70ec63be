#!/bin/bash
# Compresses a model in a job that may be preempted or run out of time.
#   sbatch docs/jobs/slurm.sh
#SBATCH --job-name=slimrank
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --gres=gpu:1
#SBATCH --mem=128G
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slimrank-%j.log
# Two minutes before the time is up, this script gets SIGUSR1.
#SBATCH --signal=B:USR1@120
set -euo pipefail

MODEL=${MODEL:-meta-llama/Llama-3.1-8B} # a folder, or a hub id that is in the cache already
TEXT=${TEXT:-$HOME/slimrank/text.txt}
OUT=${OUT:-$HOME/slimrank/small}

export HF_HOME=${HF_HOME:-$HOME/.cache/huggingface}
export HF_HUB_OFFLINE=1

# OUT gets its name only once it is whole.
if [ -d "$OUT" ]; then
    echo "$OUT stands already"
    exit 0
fi

# Out of time: into the queue again. A job that is preempted gets there by --requeue. Either way
# Slurm sends SIGTERM to the step.
trap 'scontrol requeue "$SLURM_JOB_ID"' USR1

# The same line begins the work and goes on with it.
# srun does not take the number of CPUs from the job.
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" \
    slimrank compress "$MODEL" "$OUT" --keep 0.8 --calibration "$TEXT" --device cuda --resume &
wait "$!"
