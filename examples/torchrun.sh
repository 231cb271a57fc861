#!/bin/bash
# On each of the machines:  examples/torchrun.sh MACHINES FIRST_MACHINE IMAGES RUN [OPTIONS OF crosslevel train]
# A process or a machine that dies has all processes started again, at most three times; they go on from the last
# checkpoint. A machine joins again by the same command; where the first one was lost, all others end and need it too.
# RUN lies on a disk that all machines share, and names the call: a later one with the same RUN resumes it.
machines=$1 first=$2 images=$3 run=$4
shift 4

where=(--run "$run")
[ -f "$run/checkpoints/last.ckpt" ] && where=(--resume "$run")
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # a store for each start: those of before would look for what is gone
exec torchrun --nnodes "$machines" --nproc-per-node "${DEVICES:-gpu}" --max-restarts 3 \
    --rdzv-backend c10d --rdzv-endpoint "$first:29400" --rdzv-id "$(basename "$run")" \
    --no-python -- crosslevel train "$images" "${where[@]}" "$@"
