#!/usr/bin/env bash
# What MoAI's mixers make of what OCR reads: signs, read by rapidocr, and a finished quickstart's model that learns to answer
# what they say; against the same model, trained equally, that is told nothing. Three seeds; a table of exact answers and
# characters on new pictures and on words that were never trained on, with mean ± deviation. Minutes on 2 CPU cores; after a
# stop the same command goes on.
#
#   pip install 'unimoe[quickstart,perception]'
#   runs/moai_ocr.sh [--start QUICKSTART_OUT] [--out DIR] [--steps N] [--seeds N] [--train N] [--unseen N]
set -euo pipefail
exec python -m unimoe.quickstart.moai_ocr "$@"
