#!/usr/bin/env bash
# Run a command again until it is done:  launch/until_done.sh python -m phased_ift_jax.train CONFIG
#
# Meant for machines that are taken away and come back: put this line where the machine runs it when it starts. Exit codes of the
# product: 0 done; 2 the input is at fault, which trying again cannot mend; 75 (or 130) stopped on request, so stop too: the machine
# that is back runs this again. Anything else is tried again, ATTEMPTS times at most (default 10), PAUSE seconds apart (default 10).
set -u
if [ $# -eq 0 ]; then
  echo "usage: $0 COMMAND..." >&2
  exit 2
fi
for attempt in $(seq 1 "${ATTEMPTS:-10}"); do
  "$@"
  code=$?
  case $code in
    0 | 2 | 75 | 130) exit "$code" ;;
  esac
  echo "attempt $attempt of ${ATTEMPTS:-10} ended with exit code $code" >&2
  sleep "${PAUSE:-10}"
done
exit "$code"
