#!/usr/bin/env bash
# How fast Llama-2-7B trains on this machine's NVIDIA GPU, beside transformers on PyTorch:  benchmarks/gpu_speed.sh [--kinds 4096 ...] [--tiny]
#
# See gpu_speed.py. Uses $PYTHON (with `.[cuda]`) and $TORCH_PYTHON (with torch and transformers) where they are set; else makes an environment
# for each in $WORK (default: a folder that is removed). Exit codes: 0 the goal is met; 1 it is missed, or a side failed; 2 no GPU here.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

refuse() { echo "error: $*" >&2 && exit 2; }

case " $* " in
  *" -h "* | *" --help "*) sed -n '2,5s/^# \{0,1\}//p' "$0" && exit ;;
  *" --tiny "*) ;;
  *) nvidia-smi --query-gpu=name --format=csv,noheader >/dev/null 2>&1 || refuse "nvidia-smi finds no NVIDIA GPU here; --tiny goes the same way on a CPU" ;;
esac

if [ -z "${PYTHON:-}" ] || [ -z "${TORCH_PYTHON:-}" ]; then
  work=${WORK:-}
  if [ -z "$work" ]; then
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
  fi
  python3 -m venv "$work/uv"
  "$work/uv/bin/python" -m pip install -q uv
  [ -n "${PYTHON:-}" ] || { "$work/uv/bin/uv" venv -q --python 3.12 "$work/ours" && "$work/uv/bin/uv" pip install -q --python "$work/ours/bin/python" -e "${root}[cuda]" 'jax[cuda13]>=0.11,<0.12'; }
  [ -n "${TORCH_PYTHON:-}" ] || { "$work/uv/bin/uv" venv -q --python 3.12 "$work/theirs" && "$work/uv/bin/uv" pip install -q --python "$work/theirs/bin/python" torch==2.13.0 'transformers>=5.23,<6' numpy; }
fi
export PYTHONPATH=$root:$root/benchmarks${PYTHONPATH:+:$PYTHONPATH}
"${PYTHON:-$work/ours/bin/python}" "$root/benchmarks/gpu_speed.py" --torch_python "${TORCH_PYTHON:-$work/theirs/bin/python}" "$@"
