#!/usr/bin/env bash
# Train a 7B model of 8 experts on the 8 GPUs of a machine, or on several such machines.
#
#   runs/eight_gpu.sh MODEL DATA OUT [--set FIELD=VALUE ...]
#
# MODEL: a folder that `unimoe convert upcycle --experts 8` or `unimoe convert import` wrote. DATA: a folder with
# train.jsonl and its media. On N machines run the same command on each, with NODES=N, HEAD=the first one's address, and
# OUT on a disk that all of them see; the recipe's data then is 8 * N, its expert stays 8: experts are spread within a
# machine, where the links are fast. The same command goes on after a stop. GPUS is the number of devices per machine (8),
# PORT that of the first machine where the others find it (29400).
set -euo pipefail

if [ $# -lt 3 ]; then
    sed -n '2,11s/^# \{0,1\}//p' "$0"
    exit 2
fi
here=$(cd "$(dirname "$0")" && pwd)
model=$(realpath "$1") data=$(realpath "$2") out=$(realpath -m "$3")
shift 3
nodes=${NODES:-1}
gpus=${GPUS:-8}
recipe=("$here/eight_gpu.yaml" --out "$out" --set "model=$model" --set "data=[$data/train.jsonl]"
    --set "media_root=$data" --set "parallel.data=$((nodes * gpus))" --set "parallel.expert=$gpus" "$@")

unimoe train "${recipe[@]}" --plan
# A rank that dies ends the others within a minute; torchrun then starts all of them again, up to three times, and they
# go on from the newest complete checkpoint.
exec torchrun --nnodes "$nodes" --nproc_per_node "$gpus" --max_restarts 3 \
    --rdzv_backend c10d --rdzv_id unimoe --rdzv_endpoint "${HEAD:-127.0.0.1}:${PORT:-29400}" \
    -m unimoe train "${recipe[@]}"
