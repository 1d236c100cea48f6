#!/usr/bin/env bash
# What one worker of a TPU slice does for launch/tpu_vm.sh, which sends this file there; not meant to be called by hand.
#
#   setup COMMIT EXTRAS [COMMAND]      the code of phased_ift.tar.gz, an environment with its packages, and then COMMAND
#   start ID RUN_ID CONFIG [FLAGS]     train, detached; NAME=VALUE lines of its environment come over standard input, and a line END
#   state SEEN                         running, exited CODE, lost, none or bare; and worker 0's log after the first SEEN lines
#   stop [ID]                          ask the run (if it is this one) to end
#   log ARGS | status
#
# All lies in ~/phased_ift: code/ (where the run works), venv/, and run/ with its log, exit_code and lock; nobody else may look there.
# What is sent through standard input is in no file and no argument. Each verb says on one line that starts with @@worker how it ended.
# shellcheck disable=SC2329 # verbs are called by their name
set -euo pipefail
home=$HOME/phased_ift
code=$home/code
run=$home/run

number() { # of this worker in its slice
  local host
  host=$(hostname)
  case $host in
    *-w-[0-9]*) echo "${host##*-w-}" ;;
    *) curl -sf -m 5 -H 'Metadata-Flavor: Google' http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number || echo 0 ;;
  esac
}

say() { echo "@@worker $number: $*"; }

at_work() { ! flock -n -s "$run/lock" true; } # the run's processes hold it, and no one else; a pid may have become another's

setup() {
  local commit=$1 extras=$2 command=${3-} uv
  if at_work; then
    echo "a run is at work here; stop it first" >&2
    return 1
  fi
  rm -f "$home/commit"
  mkdir -p "$code"
  tar -tzf phased_ift.tar.gz >"$home/shipped.new"
  if [ -f "$home/shipped" ]; then # what was sent before and is no more; what the runs have made stays
    grep -vxFf "$home/shipped.new" "$home/shipped" | grep -v '/$' | (cd "$code" && tr '\n' '\0' | xargs -0 rm -f) || true
  fi
  tar -xzf phased_ift.tar.gz -C "$code"
  mv "$home/shipped.new" "$home/shipped"
  # the images of v4 to v6e bring Python 3.10, which is too old for us: uv fetches one
  uv=$(command -v uv || echo "$HOME/.local/bin/uv")
  [ -x "$uv" ] || PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv
  "$uv" venv --quiet --allow-existing --python 3.12 "$home/venv"
  "$uv" pip install --quiet --python "$home/venv" --editable "${code}[$extras]"
  cd "$code"
  "$home/venv/bin/python" -c 'import phased_ift_jax.train'
  if [ -n "$command" ]; then
    PATH=$home/venv/bin:$PATH bash -euo pipefail -c "$command"
  fi
  echo "$commit" >"$home/commit"
}

start() {
  local id=$1 run_id=$2 line all=''
  shift 2
  while IFS= read -r line; do
    case $line in
      END) all=yes && break ;;
      [A-Za-z_]*=*) export "${line?}" ;;
    esac
  done
  if [ -z "$all" ]; then # gcloud repeats a connection that broke, but not what it has read for it already
    echo "the connection broke before all was said" >&2
    return 74
  fi
  if [ "$(cat "$run/id" 2>/dev/null)" = "$id" ]; then
    return 0 # the same start, said again
  fi
  if at_work; then
    echo "a run is at work here; stop it first" >&2
    return 1
  fi
  export PHASED_IFT_RUN_ID=$run_id
  rm -f "$run/exit_code" "$run/asked" "$run/pid"
  printf '%s\0' "$@" >"$run/words"
  echo "$id" >"$run/id"
  setsid bash "$0" supervise </dev/null >>"$run/log" 2>&1 &
  for _ in $(seq 100); do
    [ ! -f "$run/pid" ] || return 0
    sleep 0.1
  done
  echo "the run did not start; see the log" >&2
  return 1
}

words_of_run() { # into the array `words`
  local word
  words=()
  while IFS= read -r -d '' word; do words+=("$word"); done <"$run/words"
}

supervise() { # the process that outlives the connection
  local words ended=0
  exec 9>"$run/lock"
  flock -w 10 9
  words_of_run
  cd "$code"
  export PATH=$home/venv/bin:$PATH
  echo "== $(date -u +%FT%TZ) commit $(cat "$home/commit"): python -m phased_ift_jax.train$(printf ' %q' "${words[@]}")"
  bash launch/until_done.sh python -m phased_ift_jax.train "${words[@]}" &
  echo $! >"$run/pid.new"
  mv "$run/pid.new" "$run/pid"
  wait $! || ended=$?
  echo "== $(date -u +%FT%TZ) exit code $ended"
  echo "$ended" >"$run/exit_code.new"
  mv "$run/exit_code.new" "$run/exit_code"
}

state() { # running | exited CODE [asked] | lost (the machine has started anew) | none | bare (not set up); then how many lines the log has
  local seen=$1 lines=0 now
  [ ! -f "$run/log" ] || lines=$(wc -l <"$run/log")
  if [ "$seen" != - ] && [ "$number" = 0 ] && [ "$lines" -gt "$seen" ]; then
    tail -n "+$((seen + 1))" "$run/log" | head -n "$((lines - seen))" | tail -n 200
  fi
  if at_work; then
    now=running
  elif [ -f "$run/exit_code" ]; then
    now="exited $(cat "$run/exit_code")$([ ! -f "$run/asked" ] || echo " asked")"
  elif [ -f "$run/id" ]; then
    now=lost
  elif [ -f "$home/commit" ]; then
    now=none
  else
    now=bare
  fi
  say "$now lines $lines"
}

stop() {
  if at_work && [ "${1:-$(cat "$run/id")}" = "$(cat "$run/id")" ]; then
    touch "$run/asked"
    kill -s TERM "$(cat "$run/pid")"
  fi
}

status() {
  local words output
  words_of_run
  cd "$code"
  # as the training reads its command
  output=$("$home/venv/bin/python" -c 'import sys; from phased_ift_jax import cli, train; cli.run(lambda argv: print(train.parse(argv)[0].output_dir) or 0, sys.argv[1:])' "${words[@]}")
  exec "$home/venv/bin/python" -m phased_ift_jax.status "$output"
}

main() { # one function and a last line, so that bash reads on nowhere when a newer file has taken this one's place
  local verb=$1 ended=0
  shift
  mkdir -p "$run"
  chmod 700 "$home" # nothing in it is for other users of the machine
  [ "$verb" = supervise ] || number=$(number)
  case $verb in
    setup | start | stop)
      bash -euo pipefail "$0" "inside_$verb" "$@" >"$home/$verb.log" 2>&1 || ended=$?
      [ "$ended" -eq 0 ] || tail -n 30 "$home/$verb.log" | sed "s/^/worker $number| /" >&2
      say "exit $ended"
      exit "$ended"
      ;;
    inside_*) "${verb#inside_}" "$@" ;;
    log) exec tail "$@" "$run/log" ;;
    state | status | supervise) "$verb" "$@" ;;
    *)
      echo "unknown verb '$verb'" >&2
      exit 2
      ;;
  esac
}
{ main "$@"; exit; }
