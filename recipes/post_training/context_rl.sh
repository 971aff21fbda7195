#!/usr/bin/env bash
# Context-RL against outcome-only RL on openkeye-tiny: references, SFT, RL by both rewards, held-out scores, a table.
#
#     JOBS=6 bash recipes/post_training/context_rl.sh
#     PIECE=480 JOBS=6 bash recipes/post_training/context_rl.sh     # again and again while it exits with 3
#
# RUN     where everything is written (runs/context_rl)
# FROM    the model that SFT begins with (openkeye-tiny)
# ARMS    of outcome, context, outcome+recovery, context+recovery (all four)
# SEEDS   ("0 1 2")
# STEPS   of SFT (300) and of RL (60): SFT_STEPS, RL_STEPS
# NUM     held-out questions, each answered four times (300)
# SFT_WORDS, RL_WORDS: more settings, as words of `openkeye train` and `openkeye rl`
source "$(dirname "$0")/pieces.sh"
RUN=${RUN:-runs/context_rl} FROM=${FROM:-openkeye-tiny} NUM=${NUM:-300}
ARMS=${ARMS:-outcome context outcome+recovery context+recovery}
SFT_STEPS=${SFT_STEPS:-300} RL_STEPS=${RL_STEPS:-60} SFT_WORDS=${SFT_WORDS:-} RL_WORDS=${RL_WORDS:-}
SAMPLES=${SAMPLES:-4}

held_out() { score "$1" "$2/held_out.json" arithmetic split=test max_number=15 --num "$NUM" --samples "$SAMPLES" --max-tokens 96; }

arm() { # NAME-seedN
    local name=${1%-seed*} seed=${1##*-seed} recovers=false
    if [[ "$name" == *+recovery ]]; then recovers=true; fi
    train rl context_rl.py:context_rl "$RUN/$1/model" run_dir="$RUN/$1/run" model_dir="$RUN/start" reward="${name%+*}" \
        recovers="$recovers" seed="$seed" num_steps="$RL_STEPS" $RL_WORDS
    held_out "$RUN/$1/model" "$RUN/$1"
}

references "$RUN/arithmetic.jsonl" "${NUM_REFERENCES:-40000}" arithmetic unsound_share=0.5 max_number=15
if [ ! -f "$RUN/retries.jsonl" ]; then
    $PYTHON -m recipes.post_training.retries "$RUN/retries.unfinished" "${NUM_REFERENCES:-8000}" seed=1000 max_number=15
    mv "$RUN/retries.unfinished" "$RUN/retries.jsonl"
fi
train train text_sft.py "$RUN/start" data.arithmetic="$RUN/arithmetic.jsonl" \
    data.retries="$RUN/retries.jsonl" weights.retries=0.15 model_dir="$FROM" run_dir="$RUN/sft" \
    num_steps="$SFT_STEPS" $SFT_WORDS
held_out "$RUN/start" "$RUN/start-scores"
runs=()
for seed in $SEEDS; do for name in $ARMS; do runs+=("$name-seed$seed"); done; done
side_by_side arm "${runs[@]}"
$PYTHON -m recipes.post_training.table "$RUN/start-scores" "${runs[@]/#/$RUN/}" \
    --rewards outcome,process,right_answer_wrong_reasoning
