#!/usr/bin/env bash
# MOPD at the size of openkeye-tiny: teachers by RL, the student, its rivals, every switch, and one table.
#
#     bash recipes/post_training/mopd.sh               # to the end
#     PIECE=480 bash recipes/post_training/mopd.sh     # at most 8 minutes; run it again while it exits with status 3
#
# Every part goes on from its own checkpoint, and is left out once its result is there; costs.tsv has its seconds.
#
# RUN      where everything is written (runs/mopd)
# START    the weights that everybody begins with (openkeye-tiny)
# SEEDS    "0 1 2"
# DOMAINS  of recipes/post_training/domains.py, five at least
# PARTS    of: teachers student mixed sequential answers average estimators leave_out switches scores ("all of them")
# EXAMPLES unseen ones of each domain in the scores (300)
# TEACHER_STEPS, STUDENT_STEPS, ANSWERS (of each teacher, for SFT): 60, 120, 600
# RL_WORDS, DISTILL_WORDS, TRAIN_WORDS  more settings, for example for a CPU
set -euo pipefail
RUN=${RUN:-runs/mopd} START=${START:-openkeye-tiny} SEEDS=${SEEDS:-0 1 2} PIECE=${PIECE:-} EXAMPLES=${EXAMPLES:-300}
DOMAINS=${DOMAINS:-localisation counting before_after co_occurrence reading two_moments}
PARTS=${PARTS:-teachers student mixed sequential answers average estimators leave_out switches scores}
TEACHER_STEPS=${TEACHER_STEPS:-60} STUDENT_STEPS=${STUDENT_STEPS:-120} ANSWERS=${ANSWERS:-600}
RL_WORDS=${RL_WORDS:-} DISTILL_WORDS=${DISTILL_WORDS:-} TRAIN_WORDS=${TRAIN_WORDS:-}
PYTHON=${PYTHON:-python} OPENKEYE=${OPENKEYE:-$PYTHON -m openkeye.apps.commands}
HERE=$(dirname "$0")
LIST=${DOMAINS// /,}
NUM_DOMAINS=$(wc -w <<< "$DOMAINS")
SECONDS=0
mkdir -p "$RUN"

left() { # words that end a run in time; status 3 where no time is left
    if [ -z "$PIECE" ]; then return; fi
    if [ "$SECONDS" -ge "$PIECE" ]; then echo "out of time; run the same command again" >&2; exit 3; fi
    echo "--stop-after-seconds $((PIECE - SECONDS))"
}

told() { # NAME BEGAN STATUS
    printf '%s\t%s\t%s\n' "$1" "$((SECONDS - $2))" "$3" >> "$RUN/costs.tsv"
    if [ "$3" -ne 0 ]; then exit "$3"; fi
}

make() { # COMMAND RECIPE NAME WORDS...: a run whose model is $RUN/NAME
    local command=$1 recipe=$2 name=$3 began=$SECONDS status=0 limit
    shift 3
    if [ -f "$RUN/$name/config.json" ]; then return; fi
    limit=$(left) || exit 3
    # shellcheck disable=SC2086
    $OPENKEYE "$command" "$recipe" out_dir="$RUN/$name" run_dir="$RUN/$name-run" "$@" $limit || status=$?
    told "$name" "$began" "$status"
}

rl() { # RECIPE NAME WORDS...
    # shellcheck disable=SC2086
    make rl "$HERE/$1" "$2" "${@:3}" $RL_WORDS
}

distil() { # NAME SEED WORDS...
    # shellcheck disable=SC2086
    make distill "$HERE/mopd.py" "$1" folder="$RUN/seed$2/teachers" domains="$LIST" model_dir="$START" \
        num_steps="$STUDENT_STEPS" seed="$2" "${@:3}" $DISTILL_WORDS
}

score() { # MODEL FOLDER DOMAINS...
    local began=$SECONDS status=0 seconds=() folder=$2 model=$1
    shift 2
    if ! part scores; then return; fi
    if [ -n "$PIECE" ]; then left > /dev/null || exit 3; seconds=(--seconds $((PIECE - SECONDS))); fi
    $PYTHON -m recipes.post_training.scores --model "$model" --folder "$folder" --num "$EXAMPLES" "${seconds[@]}" "$@" || status=$?
    told "$folder" "$began" "$status"
}

score_all() { # MODEL FOLDER
    # shellcheck disable=SC2086
    score "$1" "$2" $DOMAINS
}

part() { # NAME: whether it is wanted
    [[ " $PARTS " == *" $1 "* ]]
}

answers_of() { # SEED: what its teachers say to training examples
    local words=() folder=$RUN/seed$1/answers
    for domain in $DOMAINS; do
        local began=$SECONDS status=0
        words+=("data.$domain=$folder/$domain.jsonl")
        if [ -f "$folder/$domain.jsonl" ]; then continue; fi
        left > /dev/null || exit 3
        $PYTHON -m recipes.post_training.scores --model "$RUN/seed$1/teachers/$domain" --folder "$folder" --split train \
            --answers --num "$ANSWERS" "$domain" || status=$?
        told "$folder/$domain" "$began" "$status"
    done
    # shellcheck disable=SC2086
    make train "$HERE/mopd.py:answers" "seed$1/answers_sft" model_dir="$START" num_steps="$STUDENT_STEPS" seed="$1" \
        "${words[@]}" $TRAIN_WORDS
}

score_all "$START" "$RUN/scores/start"
for seed in $SEEDS; do
    base=seed$seed
    if part teachers; then
        for domain in $DOMAINS; do
            rl teachers.py "$base/teachers/$domain" domain="$domain" model_dir="$START" num_steps="$TEACHER_STEPS" seed="$seed"
            score "$RUN/$base/teachers/$domain" "$RUN/scores/teachers/$base" "$domain"
        done
    fi
    if part student; then
        distil "$base/student" "$seed"
        score_all "$RUN/$base/student" "$RUN/scores/student/$base"
    fi
    if part mixed; then
        rl teachers.py:mixed "$base/mixed" domains="$LIST" model_dir="$START" num_steps=$((TEACHER_STEPS * NUM_DOMAINS)) seed="$seed"
        score_all "$RUN/$base/mixed" "$RUN/scores/mixed/$base"
    fi
    if part sequential; then
        before=$START
        for domain in $DOMAINS; do
            rl teachers.py "$base/sequential/$domain" domain="$domain" model_dir="$before" num_steps="$TEACHER_STEPS" seed="$seed"
            before=$RUN/$base/sequential/$domain
        done
        score_all "$before" "$RUN/scores/sequential/$base"
    fi
    if part answers; then
        answers_of "$seed"
        score_all "$RUN/$base/answers_sft" "$RUN/scores/answers_sft/$base"
    fi
    if part average; then
        if [ ! -f "$RUN/$base/average/config.json" ]; then
            teachers=()
            for domain in $DOMAINS; do teachers+=("$RUN/$base/teachers/$domain"); done
            $PYTHON -m recipes.post_training.average "$RUN/$base/average" "${teachers[@]}"
        fi
        score_all "$RUN/$base/average" "$RUN/scores/average/$base"
    fi
    if part estimators; then
        for estimator in keye_literal sampled full; do
            distil "$base/$estimator" "$seed" estimator="$estimator"
            score_all "$RUN/$base/$estimator" "$RUN/scores/$estimator/$base"
        done
    fi
    if part leave_out; then
        for domain in $DOMAINS; do
            distil "$base/without_$domain" "$seed" leave_out="$domain"
            score_all "$RUN/$base/without_$domain" "$RUN/scores/without_$domain/$base"
        done
    fi
    if part switches; then
        distil "$base/no_overlap" "$seed" support=student
        distil "$base/no_scaling" "$seed" is_scaled=false
        distil "$base/no_penalty" "$seed" penalty=0
        for name in no_overlap no_scaling no_penalty; do score_all "$RUN/$base/$name" "$RUN/scores/$name/$base"; done
    fi
done
if part scores; then $PYTHON -m recipes.post_training.mopd_table "$RUN"; fi
