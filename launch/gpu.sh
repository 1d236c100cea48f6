#!/usr/bin/env bash
# Train on the NVIDIA GPUs of this machine, one or several, again after a crash, until done:  launch/gpu.sh CONFIG [--training.learning_rate 1e-5 ...]
#
# Uses $PYTHON where it is set, else .venv beside this folder, which is made and filled where it has no JAX for GPUs. All GPUs are used
# that CUDA_VISIBLE_DEVICES leaves. --dry_run (first) stops after the checks. Exit codes: those of the training; 2 what is missing here.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
NEWEST_CUDA=13 DRIVER=580 # of jax[cuda13], which `.[cuda]` asks for, and the first driver that it runs on

refuse() { echo "error: $*" >&2 && exit 2; }

dry_run='' first=${1-}
case $first in
  '' | -h | --help) sed -n '2,5s/^# \{0,1\}//p' "$0" && exit $((${#first} ? 0 : 2)) ;;
  --dry_run | --dry-run) dry_run=yes && shift ;;
esac
[ $# -gt 0 ] || refuse "which CONFIG? Such as configs/llama2_7b.yaml, or llama2_7b_h200.yaml on one H200"
config=$1
[[ $config != -* ]] || refuse "'$config' is no CONFIG; flags stand after it"
[ -f "$config" ] || refuse "CONFIG: no such file '$config'"

command -v nvidia-smi >/dev/null || refuse "no nvidia-smi here: no NVIDIA GPU, or no driver; python -m phased_ift_jax.train $config would train on what there is"
told=$(nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader 2>&1) || refuse "nvidia-smi finds no GPU: ${told%%$'\n'*}"
[ -n "$told" ] || refuse "nvidia-smi finds no GPU"
driver=$(sed -n '1s/.*, *//p' <<<"$told")
[[ $driver =~ ^[0-9]+\. ]] || refuse "nvidia-smi does not tell the driver's version: ${told%%$'\n'*}"
[ "${driver%%.*}" -ge "$DRIVER" ] || refuse "the driver is $driver, and CUDA $NEWEST_CUDA needs $DRIVER or newer; update it"

venv=$root/.venv
python=${PYTHON:-$venv/bin/python}
has_cuda() { "$python" -c "import jax_cuda${NEWEST_CUDA}_plugin, phased_ift_jax" 2>/dev/null; }
if [ -n "${PYTHON-}" ]; then
  has_cuda || refuse "PYTHON: $PYTHON has not all of '.[cuda]'; install it there: $PYTHON -m pip install -e '.[cuda]'"
elif ! has_cuda; then
  [ -z "$dry_run" ] || refuse "$venv has not all of '.[cuda]'; without --dry_run it is installed there"
  echo "installing '.[cuda]' into $venv" >&2
  [ -x "$python" ] || python3 -m venv "$venv"
  "$python" -m pip install -q uv
  "$python" -m uv pip install -q --python "$python" -e "${root}[cuda]"
fi

echo "GPUs     $(wc -l <<<"$told"): $(cut -d, -f1,2 <<<"$told" | sort | uniq -c | sed 's/^ *\([0-9]*\) /\1 x /' | paste -sd';')${CUDA_VISIBLE_DEVICES+, of which CUDA_VISIBLE_DEVICES leaves $CUDA_VISIBLE_DEVICES}"
echo "driver   $driver"
echo "python   $python ($("$python" -c 'import jax, platform; print(f"{platform.python_version()}, jax {jax.__version__}")'))"
echo "commit   $(git -C "$root" describe --always --dirty 2>/dev/null || echo unknown)"
echo "command  python -m phased_ift_jax.train$(printf ' %q' "$@")"
[ -z "$dry_run" ] || exit 0
exec "$root/launch/until_done.sh" "$python" -m phased_ift_jax.train "$@"
