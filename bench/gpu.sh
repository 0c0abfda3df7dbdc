#!/usr/bin/env bash
# Measure this project on one GPU: results/bench_gpu/*.json, and a table of them (README.md there).
#
#   bash bench/gpu.sh             everything but the table of runs, in at most 9 minutes on an H100 or H200
#   bash bench/gpu.sh training engine
#   bash bench/gpu.sh --dry       at tiny sizes, on a CPU, so that nothing fails for a typo
#
# Parts, in the order of their worth: engine training steps trl sync mismatch 1b. They need models/smollm2 and
# models/one_digit.jsonl (python tiny/smollm2.py --problems models/one_digit.jsonl). Each process has a time
# limit, and a part that it does not reach is shown as not measured. PYTHON chooses the interpreter.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python} out=${OUT_DIR:-results/bench_gpu} dry= model=models/smollm2
data=models/one_digit.jsonl big=random-1b
if [ "${1:-}" = --dry ]; then
  shift
  dry="--dry True" model=tiny/llama data=tiny/problems/test.jsonl big=tiny/llama
fi
parts=" ${*:-engine training steps trl sync mismatch 1b} "
wants() { [[ $parts == *" $1 "* ]]; }
mkdir -p "$out"
gpu() { # SECONDS, then the arguments of gpu.py
  timeout --kill-after=10 "$1" "$python" bench/gpu.py --data $data --out "$out" $dry "${@:2}"
}

mine=()
for part in engine sync mismatch steps; do wants $part && mine+=("$part"); done
wants training && gpu 150 --model $big --parts training
((${#mine[@]})) && gpu 300 --model $model --parts "${mine[@]}"
wants 1b && gpu 120 --model ${BIG_ENGINE:-$model} --parts sync
exit 0
