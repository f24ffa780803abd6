#!/usr/bin/env bash
# Uni-MoE at 7B from published parts to the tuned mixture: the recipes of this folder in their order.
#
#   runs/unimoe_7b/run.sh speech|sound|eight
#
# speech is the paper's MoE-Task2 (every layer sparse), sound its MoE-Task3 (every other layer), eight its MoE-Task4 with
# 8 experts. README.md says what must lie in data/ and media/ before. After a stop, the same command goes on. The parts
# are LLAVA and WHISPER, folders or Hub ids, and BEATS, a file.
set -euo pipefail
cd "$(dirname "$0")"

LLAVA=${LLAVA:-llava-hf/llava-1.5-7b-hf} WHISPER=${WHISPER:-openai/whisper-small}
BEATS=${BEATS:-BEATs_iter3_plus_AS2M.pt}

compose() { # OUT [options]; done only once
    [ -e "$1" ] || unimoe convert compose --language-model "$LLAVA" --out "$@"
}

start_speech() { # LLaVA with Whisper's encoder and a query decoder that starts as Whisper's decoder
    compose start-speech --speech-tower "$WHISPER" --speech-connector query_decoder --speech-tokens 50
}

start_sound() { # LLaVA with BEATs and a new Q-Former
    compose start-sound --beats "$BEATS" --sound-connector qformer --sound-tokens 50
}

train() {
    for recipe in "$@"; do unimoe train "$recipe.yaml"; done
}

assemble() { # OUT [options]; done only once
    [ -e "$1" ] || unimoe convert assemble --out "$@"
}

tuned() { # the model that a task of stage 2 left
    echo "training/2_expert_$1/expert/model"
}

case ${1:-} in
speech)
    start_speech
    train 1_align_speech 2_expert_2 2_expert_3 2_expert_7
    # Experts in the order of the paper's figure 5, the first being LLaVA's own. That the connectors are those of
    # task 3, which trained both of them, is ours.
    assemble assembled-speech --base "$(tuned 3)" --layers all --top-k 2 --expert llava=start-speech \
        --expert image="$(tuned 2)" --expert spoken="$(tuned 3)" --expert listening="$(tuned 7)"
    train 3_mix_task2
    ;;
sound)
    start_speech
    start_sound
    train 1_align_speech 1_align_sound 2_expert_2 2_expert_3 2_expert_8
    assemble assembled-sound --base "$(tuned 8)" --layers even --top-k 2 --expert llava=start-sound \
        --expert image="$(tuned 2)" --expert spoken="$(tuned 3)" --expert sound="$(tuned 8)"
    train 3_mix_task3
    ;;
eight)
    start_speech
    start_sound
    train 1_align_speech 1_align_sound 2_expert_1 2_expert_2 2_expert_4 2_expert_7 2_expert_8
    # The released files in their order: mlp_audiocap, mlp_basev, mlp_base, mlp_base1, mlp_base4, mlp_base7, and two of
    # them again. Which task made which file nobody says; this reading of their names is ours.
    assemble assembled-eight --base "$(tuned 4)" --layers all --top-k 2 --expert audiocap="$(tuned 8)" \
        --expert basev=start-speech --expert base="$(tuned 2)" --expert base1="$(tuned 1)" \
        --expert base4="$(tuned 4)" --expert base7="$(tuned 7)" --expert base="$(tuned 2)" \
        --expert base7="$(tuned 7)"
    train 3_mix_task4_eight
    ;;
*)
    sed -n '2,8s/^# \{0,1\}//p' run.sh
    exit 2
    ;;
esac
