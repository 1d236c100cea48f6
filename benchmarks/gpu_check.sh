#!/usr/bin/env bash
# Check this machine's NVIDIA GPU, unattended; made to take less than ten minutes:  benchmarks/gpu_check.sh [--steps N] [--rows N] [--tiny]
#
# Attention kernels against the reference, and 20 steps of Llama-2-7B: see gpu_check.py. Uses $PYTHON where it is set, which no internet
# is needed for; else an environment with Python 3.12, `.[cuda]` and jax 0.11, which is made in $WORK (default: a folder that is removed).
# With $OUT the result lies there as gpu_check.json, too. Exit codes: 0 all is well; 1 a kernel or the training is wrong; 2 no GPU here.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

refuse() { echo "error: $*" >&2 && exit 2; }

case " $* " in
  *" -h "* | *" --help "*) sed -n '2,6s/^# \{0,1\}//p' "$0" && exit ;;
  *" --tiny "*) ;;
  *)
    command -v nvidia-smi >/dev/null || refuse "no nvidia-smi here: no NVIDIA GPU, or no driver; --tiny goes the same way on a CPU"
    told=$(nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader 2>&1) || refuse "nvidia-smi finds no GPU: ${told%%$'\n'*}"
    echo "GPU      ${told%%$'\n'*}"
    ;;
esac

python=${PYTHON:-}
if [ -z "$python" ]; then
  work=${WORK:-}
  if [ -z "$work" ]; then
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
  fi
  uv=$(command -v uv || echo "$work/uv/bin/uv")
  if [ ! -x "$uv" ]; then
    python3 -m venv "$work/uv"
    "$work/uv/bin/python" -m pip install -q uv
  fi
  python=$work/venv/bin/python
  [ -x "$python" ] || "$uv" venv -q --python 3.12 "$work/venv"
  "$uv" pip install -q --python "$python" -e "${root}[cuda]" 'jax[cuda13]>=0.11,<0.12'
fi
PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} "$python" "$root/benchmarks/gpu_check.py" "$@"
