#!/usr/bin/env bash
# The whole story at the size of openkeye-tiny: stages 0-3, indexer warm-up, sparse adaptation, an hour, SFT, scores.
#
#     bash recipes/whole_story.sh                # to the end
#     PIECE=480 bash recipes/whole_story.sh      # at most 8 minutes of training; run it again while it exits with status 3
#
# RUN     where everything is written (runs/whole_story)
# FROM    whose vision tower and language model are taken over (openkeye-tiny)
# SCALE   of the numbers of steps (1)
# CLIPS   of each tier in the scores (400); the hour tier takes a tenth of them; 0 leaves the scores out
# WORKERS processes that make clips (one less than the cores)
set -euo pipefail
RUN=${RUN:-runs/whole_story} FROM=${FROM:-openkeye-tiny} SCALE=${SCALE:-1} CLIPS=${CLIPS:-400} PIECE=${PIECE:-}
WORKERS=${WORKERS:-$(($(nproc) > 1 ? $(nproc) - 1 : 1))}
PYTHON=${PYTHON:-python} OPENKEYE=${OPENKEYE:-$PYTHON -m openkeye.apps.commands}
RECIPE=$(dirname "$0")/whole_story.py
SECONDS=0

train() { # FUNCTION MODEL OUT
    local limit=()
    if [ -f "$3/config.json" ]; then return; fi
    if [ -n "$PIECE" ]; then
        if [ "$SECONDS" -ge "$PIECE" ]; then exit 3; fi
        limit=(--stop-after-seconds $((PIECE - SECONDS)))
    fi
    $OPENKEYE train "$RECIPE:$1" model_dir="$2" run_dir="$RUN/$1" out_dir="$3" scale="$SCALE" num_workers="$WORKERS" "${limit[@]}"
}

if [ ! -f "$RUN/start/config.json" ]; then $PYTHON -m recipes.whole_story "$FROM" "$RUN/start"; fi
train pretraining "$RUN/start" "$RUN/dense-model"
train sparse "$RUN/dense-model" "$RUN/model"
if [ "$CLIPS" -gt 0 ]; then
    for tier in standard long hour; do
        clips=$CLIPS
        if [ "$tier" = hour ]; then clips=$(((CLIPS + 9) / 10)); fi
        $OPENKEYE evaluate frameforge --model "$RUN/model" --tier "$tier" --num "$clips" --seed 2027 --json > "$RUN/$tier.json"
        echo "$RUN/$tier.json"
    done
fi
