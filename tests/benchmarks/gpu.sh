#!/usr/bin/env bash
# Measures every claim about speed on one GPU in at most eight minutes: bash tests/benchmarks/gpu.sh [--dry] [FOLDER]
#
# FOLDER (runs/gpu by default) gets a JSON file and a log for each part, written as soon as there is something to write.
# Weights are random, shapes those of a 7B teacher and a 1.5B student. A part that exceeds its time limit is ended; what
# it has measured so far counts. The last thing printed is one table.
#
# On a machine without a network: collect what it lacks with gpu_wheels.sh beforehand, and take the folder .wheels (or
# $WHEELS) along. $PYTHON names the interpreter.
#
# --dry runs the same code on a CPU at tiny sizes, two parts at a time and without limits.
set -uo pipefail
cd "$(dirname "$0")/../.."

dry=
if [[ ${1:-} == --dry ]]; then
  dry=--quick
  export CUDA_VISIBLE_DEVICES=
  shift
fi
folder=${1:-runs/gpu}
wheels=${WHEELS:-.wheels}
python=${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}
mkdir -p "$folder"
rm -f "$folder"/*.json
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false

if [[ -z $dry && -d $wheels ]]; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$wheels"/*.whl || exit 1
  export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi

# A part's name and its limit in seconds, 0 for none.
part() {
  local started=$SECONDS
  timeout --kill-after=5 "$2" "$python" -m "tests.benchmarks.$1" $dry --json "$folder/$1.json" >"$folder/$1.log" 2>&1
  local status=$?
  echo "$1: $((SECONDS - started)) s$( ((status)) && echo ", ended with status $status; its log ends:" )"
  ((status == 0)) || tail -n 5 "$folder/$1.log"
}

if [[ -n $dry ]]; then
  { part loss 0; part feed 0; } &
  { part step 0; part capture 0; } &
  wait
else
  part loss 110
  part step 150
  part capture 110
  part feed 80
fi
"$python" -m tests.benchmarks.gpu.table "$folder"
