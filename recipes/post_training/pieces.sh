# Sourced by the scripts beside it: what they have in common. Time is counted from here.
#
# PIECE   seconds after which nothing new begins and training stops; then the script exits with 3, and is to be run again
# JOBS    runs at once on the machine (1); small models leave most of a GPU idle
set -euo pipefail
PIECE=${PIECE:-} JOBS=${JOBS:-1} SEEDS=${SEEDS:-0 1 2}
PYTHON=${PYTHON:-python} OPENKEYE=${OPENKEYE:-$PYTHON -m openkeye.apps.commands}
HERE=$(dirname "${BASH_SOURCE[0]}")
SECONDS=0

limit() { # words that stop training in time; exits where no time is left
    if [ -z "$PIECE" ]; then return; fi
    if [ "$SECONDS" -ge "$PIECE" ]; then exit 3; fi
    echo "--stop-after-seconds $((PIECE - SECONDS))"
}

references() { # FILE NUMBER TASK WORDS...: reference solutions as training data
    local file=$1 number=$2
    if [ -f "$file" ]; then return; fi
    mkdir -p "$(dirname "$file")"
    $OPENKEYE tasks "${@:3}" --num "$number" --references "$file.unfinished"
    mv "$file.unfinished" "$file"
}

train() { # COMMAND RECIPE OUT WORDS...: a run of `openkeye train` or `openkeye rl`, unless its model is there
    local words
    if [ -f "$3/config.json" ]; then return; fi
    words=$(limit)
    $OPENKEYE "$1" "$HERE/$2" out_dir="$3" "${@:4}" $words
}

score() { # MODEL FILE TASK WORDS...: a report of `openkeye evaluate task`
    local file=$2
    if [ -f "$file" ]; then return; fi
    limit > /dev/null
    mkdir -p "$(dirname "$file")"
    $OPENKEYE evaluate task "${@:3}" --model "$1" --json > "$file.unfinished"
    mv "$file.unfinished" "$file"
}

reaches() { # FOLDER LEAST: whether the mean "outcome" over the reports in it is so high
    $PYTHON -c "import json, pathlib, sys
scores = [json.loads(path.read_text())['rewards']['outcome']['mean'] for path in pathlib.Path(sys.argv[1]).glob('*.json')]
sys.exit(sum(scores) / len(scores) < float(sys.argv[2]))" "$1" "$2"
}

side_by_side() { # FUNCTION WORD...: the function for every word, JOBS at once; exits with the worst status, after all have ended
    local function=$1 worst=0 word started=()
    shift
    while [ "$#" -gt 0 ]; do
        started=()
        for word in "${@:1:JOBS}"; do
            "$function" "$word" &
            started+=("$!")
        done
        shift "$(($# < JOBS ? $# : JOBS))"
        for word in "${started[@]}"; do wait "$word" || worst=$(($? > worst ? $? : worst)); done
    done
    if [ "$worst" -ne 0 ]; then exit "$worst"; fi
}
