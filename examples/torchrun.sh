#!/bin/bash
# On each of the machines:  examples/torchrun.sh MACHINES FIRST_MACHINE IMAGES RUN [OPTIONS OF crosslevel train]
# A process that dies has all of them started again, at most three times; they go on from the last checkpoint. RUN lies
# on a disk that all machines share. A later call with the same RUN resumes it.
machines=$1 first=$2 images=$3 run=$4
shift 4

where=(--run "$run")
[ -f "$run/checkpoints/last.ckpt" ] && where=(--resume "$run")
exec torchrun --nnodes "$machines" --nproc-per-node "${DEVICES:-gpu}" --max-restarts 3 \
    --rdzv-backend c10d --rdzv-endpoint "$first:29400" --rdzv-id "$(basename "$run")" \
    --no-python -- crosslevel train "$images" "${where[@]}" "$@"
