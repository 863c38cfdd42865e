#!/bin/bash
# One training over the hosts of a Slurm job, one process a host (or a GPU), resumed by requeueing:
#
#   sbatch --nodes=3 experiments/hosts/slurm.sh runs/mine --method ist --rounds 5000
#
# The run folder must lie on a file system that all hosts see. JAX finds the other processes from
# Slurm's environment (--cluster slurm). If one host dies, the others end with exit code 75 within
# --deadline and the job goes back into the queue, at most 10 times; the next start continues from
# the last checkpoint. A process that fails by itself ends with 78, which is then srun's code, the
# highest: the job ends, for it would fail again.
#SBATCH --job-name=psjax
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=psjax-%j.log

set -u
folder=$1
shift
if [ -f "$folder/config.json" ]; then
  where=(--resume "$folder")
else
  where=(--out "$folder")
fi
# Without --kill-on-bad-exit: the processes end by themselves, each with its reason.
srun --kill-on-bad-exit=0 --wait=120 \
  python -u -m experiments.hosts.train --cluster slurm --deadline 60 "${where[@]}" "$@"
code=$?
if { [ $code -eq 75 ] || [ $code -gt 128 ]; } && [ "${SLURM_RESTART_COUNT:-0}" -lt 10 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
