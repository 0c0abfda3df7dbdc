#!/usr/bin/env bash
# What waiting threads cost: ten steps of the tiny model, alone and beside two busy loops, by how long OpenMP's
# threads spin before they sleep (flags.py sets it). A quarter of an hour on two quiet cores:
#
#   bash bench/busy.sh | tee results/busy/numbers.txt      ROUNDS=2   PYTHON=.venv/bin/python
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-.venv/bin/python}
folder=$(mktemp -d)
trap 'rm -rf "$folder"; kill $(jobs -p) 2>/dev/null || true' EXIT

measure() { # SETTING NAME: one run, and a line of the seconds of its ten steps and of the whole program
  rm -rf "$folder/run"
  local start=$SECONDS
  env "$1" "$PYTHON" train_dpo.py --sync-every 10 --steps 10 --run-dir "$folder/run" >"$folder/log" 2>&1
  "$PYTHON" - "$folder/run/metrics.jsonl" "$2" $((SECONDS - start)) <<'END'
import json, sys

rows = [json.loads(line) for line in open(sys.argv[1], encoding="utf-8")]
parts = {key: sum(row[f"{key}_s"] or 0 for row in rows) for key in ("generate", "score", "train", "step")}
print(f"{sys.argv[2]:28s}", *(f"{key} {value:5.1f}" for key, value in parts.items()), f"program {sys.argv[3]:>4s}")
END
}

nproc=$(nproc)
echo "# seconds of 10 steps; $nproc cores; commit $(git rev-parse --short HEAD)"
for ((round = 1; round <= ${ROUNDS:-2}; round++)); do
  for company in alone beside; do
    loops=()
    if [ $company = beside ]; then
      for _ in 1 2; do
        setsid sh -c 'while :; do :; done' & # as another user's program would
        loops+=($!)
      done
    fi
    measure GOMP_SPINCOUNT=300000 "$company, spin 300000 (libgomp)"
    measure GOMP_SPINCOUNT=10000 "$company, spin 10000"
    measure GOMP_SPINCOUNT=1000 "$company, spin 1000"
    measure OMP_WAIT_POLICY=PASSIVE "$company, no spin"
    [ ${#loops[@]} = 0 ] || kill "${loops[@]}"
  done
done
