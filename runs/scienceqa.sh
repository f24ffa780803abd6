#!/usr/bin/env bash
# ScienceQA's 2,224 test questions without a picture: a finished quickstart's model, SmolLM2-135M, and SmolLM2-135M upcycled
# to 4 experts, which computes the same and so must score the same. Models of this size write no letters when asked, so the
# likeliest letter counts. At the end, the two SmolLM2 compared item by item. DATA holds llava_test_CQM-A.json (or Bunny's
# bunny_test_CQM-A.json). After a stop the same command goes on.
#
#   runs/scienceqa.sh DATA [QUICKSTART_OUT] [OUT]
set -euo pipefail

data=${1:?usage: runs/scienceqa.sh DATA [QUICKSTART_OUT] [OUT]}
quickstart=${2:-quickstart-out}
out=${3:-scienceqa-out}
here=$(dirname "$0")

smollm2=$(python -c 'from unimoe.quickstart.parts import resolve_part; print(resolve_part("language-model").folder)')
[ -e "$out/smollm2-4-experts" ] || "$here/upcycle_smollm2.sh" "$out/smollm2-4-experts"

ask() {
  unimoe evaluate "$1" --tasks scienceqa_text --data "$data" --likeliest-letter --out "$out/$2" --resume
}
ask "$quickstart/model" quickstart
ask "$smollm2" dense
ask "$out/smollm2-4-experts" upcycled
unimoe evaluate --compare "$out/dense" "$out/upcycled"
