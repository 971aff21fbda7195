#!/usr/bin/env bash
# Video-RL over openkeye-tiny: three seeds, scored on unseen clips before and after, one table.
#
#     PIECE=480 bash recipes/post_training/video_rl.sh     # at most 8 minutes; run it again while it exits with status 3
#
# RUN (runs/video_rl), START (openkeye-tiny), SEEDS ("0 1 2"), STEPS (100), EXAMPLES of each task (300)
# CLIPS of recipes/post_training/domains.py ("long story"), KINDS, WORDS: more settings of the run
set -euo pipefail
RUN=${RUN:-runs/video_rl} START=${START:-openkeye-tiny} SEEDS=${SEEDS:-0 1 2} STEPS=${STEPS:-100} PIECE=${PIECE:-}
EXAMPLES=${EXAMPLES:-300} CLIPS=${CLIPS:-long story} WORDS=${WORDS:-}
KINDS=${KINDS:-localisation counting before_after co_occurrence reading motion}
PYTHON=${PYTHON:-python} OPENKEYE=${OPENKEYE:-$PYTHON -m openkeye.apps.commands}
HERE=$(dirname "$0")
SECONDS=0
mkdir -p "$RUN"

left() {
    if [ -z "$PIECE" ]; then return; fi
    if [ "$SECONDS" -ge "$PIECE" ]; then echo "out of time; run the same command again" >&2; exit 3; fi
    echo "--stop-after-seconds $((PIECE - SECONDS))"
}

told() { # NAME BEGAN STATUS
    printf '%s\t%s\t%s\n' "$1" "$((SECONDS - $2))" "$3" >> "$RUN/costs.tsv"
    if [ "$3" -ne 0 ]; then exit "$3"; fi
}

score() { # MODEL FOLDER
    local began=$SECONDS status=0 seconds=() names=()
    if [ -n "$PIECE" ]; then left > /dev/null || exit 3; seconds=(--seconds $((PIECE - SECONDS))); fi
    for clips in $CLIPS; do
        for kind in $KINDS; do names+=("${kind}_$clips"); done
    done
    $PYTHON -m recipes.post_training.scores --model "$1" --folder "$2" --num "$EXAMPLES" --max-tokens 48 "${seconds[@]}" \
        "${names[@]}" || status=$?
    told "$2" "$began" "$status"
}

score "$START" "$RUN/scores/start"
for seed in $SEEDS; do
    if [ ! -f "$RUN/seed$seed/config.json" ]; then
        limit=$(left) || exit 3
        began=$SECONDS status=0
        # shellcheck disable=SC2086
        $OPENKEYE rl "$HERE/video_rl.py" model_dir="$START" run_dir="$RUN/seed$seed-run" out_dir="$RUN/seed$seed" \
            clips="${CLIPS// /,}" kinds="${KINDS// /,}" num_steps="$STEPS" num_evaluated=0 seed="$seed" $WORDS $limit || status=$?
        told "seed$seed" "$began" "$status"
    fi
    score "$RUN/seed$seed" "$RUN/scores/video_rl/seed$seed"
done
$PYTHON -m recipes.post_training.mopd_table "$RUN"
