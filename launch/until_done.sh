#!/usr/bin/env bash
# Run a command again until it is done:  launch/until_done.sh python -m phased_ift_jax.train CONFIG
#
# Meant for machines that are taken away and come back: put this line where the machine runs it when it starts. Exit codes of the
# product: 0 done; 2 the input is at fault, which trying again cannot mend; 75 (or 130) stopped on request, so stop too: the machine
# that is back runs this again. Anything else is tried again, ATTEMPTS times at most (default 10), PAUSE seconds apart (default 10).
# SIGTERM and SIGINT are passed on to the command, whose end is awaited: it may have something to save.
set -um # -m: the command is in a process group of its own, hears Ctrl-C through us only, and does not ignore it
if [ $# -eq 0 ]; then
  echo "usage: $0 COMMAND..." >&2
  exit 2
fi
child='' asked='' again=''
# shellcheck disable=SC2329 # called by the traps
pass_on() {
  asked=yes again=yes
  [ -z "$child" ] || kill -s "$1" "$child" 2>/dev/null
}
trap 'pass_on TERM' TERM
trap 'pass_on INT' INT

for attempt in $(seq 1 "${ATTEMPTS:-10}"); do
  "$@" </dev/null & # no terminal: what asks a question would be stopped for good
  child=$!
  [ -z "$asked" ] || kill -s TERM "$child" 2>/dev/null # asked between two lines of this script
  again=yes
  while [ -n "$again" ]; do # a signal ends `wait`, not the command
    again=''
    wait "$child"
    code=$?
  done
  child='' late=$asked
  case $code in
    0 | 2 | 75 | 130) exit "$code" ;;
    143) [ -z "$asked" ] || exit 75 ;; # it died of our SIGTERM before it listened: nothing was unsaved
  esac
  echo "attempt $attempt of ${ATTEMPTS:-10} ended with exit code $code" >&2
  [ -z "$late" ] || exit "$code" # it was asked to stop, and has failed at that
  sleep "${PAUSE:-10}" &
  child=$!
  [ -n "$asked" ] || wait "$child"
  [ -z "$asked" ] || { kill "$child" 2>/dev/null; exit 75; }
  child=''
done
exit "$code"
