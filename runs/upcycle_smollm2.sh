#!/usr/bin/env bash
# SmolLM2-135M becomes a model of 4 experts that computes the same, with a receipt that proves it.
# Under 3 minutes and 2 GB of memory on 2 CPU cores, the download of the weights (93 MB, once) not counted.
#
#   runs/upcycle_smollm2.sh [OUT] [further options of `unimoe convert upcycle`]
set -euo pipefail

out=${1:-smollm2-4-experts}
shift || true

source_folder=$(python -c 'from unimoe.quickstart.parts import resolve_part; print(resolve_part("language-model").folder)')
unimoe convert upcycle "$source_folder" --out "$out" --experts 4 --top-k 2 --layers odd --router-init zeros "$@"
