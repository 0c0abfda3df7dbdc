#!/usr/bin/env bash
# Time one GRPO step of train_grpo.py beside one of TRL's GRPOTrainer: writes results/trl_step/numbers.json.
# TRL has the environment of bench/trl_reference.sh, which is installed first where it is missing.
#
#   bench/trl_step.sh [--rounds N] [--steps N] ...      7 minutes on 2 cores; --help says the rest
set -euo pipefail
cd "$(dirname "$0")/.."

# Asked for its help, that script installs the environment and runs nothing in it.
cmp -s bench/requirements-trl.txt bench/.venv/trl/installed.txt || bench/trl_reference.sh --help >/dev/null
.venv/bin/python bench/trl_step.py "$@"
