#!/usr/bin/env bash
# Make tests/trl_reference.json again: TRL's own trainers on a small batch, in an environment of their own
# (bench/.venv/trl, which git ignores; 1.5 GB, or 5 where pip takes the CUDA build of torch). On a CPU, 1 minute.
#
#   bench/trl_reference.sh [--out FILE]      PYTHON=python3.12 chooses the interpreter
set -euo pipefail
cd "$(dirname "$0")/.."

lock=bench/requirements-trl.txt
venv=bench/.venv/trl
if ! cmp -s "$lock" "$venv/installed.txt"; then # copied last, so that what is cut short is done again
  "${PYTHON:-python3}" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' || {
    echo "trl_reference: ${PYTHON:-python3} is not Python 3.11 or 3.12: name one, as in PYTHON=python3.12" >&2
    exit 1
  }
  echo "trl_reference: installing $lock into $venv (some minutes without a word)"
  rm -rf "$venv"
  "${PYTHON:-python3}" -m venv "$venv"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$lock"
  cp "$lock" "$venv/installed.txt"
fi
"$venv/bin/python" bench/trl_reference.py "$@"
