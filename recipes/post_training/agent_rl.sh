#!/usr/bin/env bash
# Agent RL in simulated services on openkeye-tiny: references, a short SFT, RL in training worlds, scores in worlds never seen.
#
#     JOBS=3 bash recipes/post_training/agent_rl.sh
#     PIECE=480 JOBS=3 bash recipes/post_training/agent_rl.sh       # again and again while it exits with 3
#
# RUN     where everything is written (runs/agent_rl)
# FROM    the model that SFT begins with (openkeye-tiny)
# SEEDS   ("0 1 2")
# SFT_STEPS ("60 120 240 480") tried in turn, until the start succeeds in LEAST (0.1) of the held-out episodes
# RL_STEPS  (80)
# NUM     held-out episodes of each level (370, ten in each of the 37 worlds)
# SFT_WORDS, RL_WORDS: more settings, as words of `openkeye train` and `openkeye rl`
source "$(dirname "$0")/pieces.sh"
RUN=${RUN:-runs/agent_rl} FROM=${FROM:-openkeye-tiny} NUM=${NUM:-370}
SFT_STEPS=${SFT_STEPS:-60 120 240 480} LEAST=${LEAST:-0.1} RL_STEPS=${RL_STEPS:-80} SFT_WORDS=${SFT_WORDS:-} RL_WORDS=${RL_WORDS:-}

held_out() { # MODEL FOLDER
    for level in 1 2; do
        score "$1" "$2/level_$level.json" api_calls split=held_out wording=plain level=$level --num "$NUM" --max-tokens 96
    done
}

arm() { # gspo-seedN
    train rl agent_rl.py:agent_rl "$RUN/$1/model" run_dir="$RUN/$1/run" model_dir="$start/model" seed="${1##*-seed}" \
        num_steps="$RL_STEPS" $RL_WORDS
    held_out "$RUN/$1/model" "$RUN/$1"
}

data=()
for level in 1 2; do
    references "$RUN/level_$level.jsonl" "${NUM_REFERENCES:-20000}" api_calls level=$level wording=plain seed=1000
    data+=("data.level_$level=$RUN/level_$level.jsonl")
done
for steps in $SFT_STEPS; do
    start=$RUN/sft-$steps
    train train text_sft.py "$start/model" "${data[@]}" model_dir="$FROM" run_dir="$start/run" num_steps="$steps" $SFT_WORDS
    held_out "$start/model" "$start"
    if reaches "$start" "$LEAST"; then break; fi
done
runs=()
for seed in $SEEDS; do runs+=("gspo-seed$seed"); done
side_by_side arm "${runs[@]}"
$PYTHON -m recipes.post_training.table "$start" "${runs[@]/#/$RUN/}" --rewards outcome
