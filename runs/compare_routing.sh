#!/usr/bin/env bash
# Dense, Vanilla MoE, Modality MoE, MoIIE and MoIIE with five groups on the starter corpus: equal active parameters, equal
# steps, three seeds; a table of held-out accuracies with mean ± deviation. Minutes on 2 CPU cores; after a stop the same
# command goes on.
#
#   runs/compare_routing.sh [--out DIR] [--start QUICKSTART_OUT] [--steps N] [--seeds N]
set -euo pipefail
exec python -m unimoe.quickstart.compare_routing "$@"
