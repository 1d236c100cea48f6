#!/usr/bin/env bash
# A run on a Cloud TPU slice, or several: from the queue for the machine to its end, over pre-emptions.  launch/tpu_vm.sh --help
#
# Written for bash 3.2 and later. What must happen on the workers happens on all of them at once, by tpu_worker.sh, and each is held
# to its answer: gcloud itself ends with 0 where it has left out a worker that it could not reach.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$here")

usage() {
  cat <<'END'
usage: launch/tpu_vm.sh VERB [flags]

  create                queue for the slice, and wait until it is there; after --, flags of
                        `gcloud compute tpus queued-resources create` (-- --network=mine --labels=team=a)
  setup                 send the code at a commit and install it on every worker
  run CONFIG [flags]    start python -m phased_ift_jax.train CONFIG [flags] on every worker, detached, and follow worker 0's log to the
                        end; what breaks here does not end the run
  status                the queue's state, each worker's, and how far the run is
  logs                  the last lines of a worker's log
  stop                  ask the run to save everything and end (exit code 75)
  resume                go on until the run is done: follow it where it is at work, start it where it has ended, and where the slice
                        was taken away, delete it, create it again with the same settings, set it up and start the same command
  delete                give the slice back; what is on its disks is gone

Settings: a flag, else what `create` was given for this name, else the environment, else the default.
  --name NAME               TPU_NAME               of the slice; PHASED_IFT_RUN_ID is set to it on the workers, so that a slice of
                                                   the same name is the same run
  --zone ZONE               TPU_ZONE               such as us-east5-b
  --project PROJECT         TPU_PROJECT            [gcloud's]
  --accelerator_type TYPE   TPU_ACCELERATOR_TYPE   v4-16, v5p-16, v5litepod-16 (v5e), v6e-16
  --runtime_version V       TPU_RUNTIME_VERSION    [by generation: up to v4 tpu-ubuntu2204-base, v5e v2-alpha-tpuv5-lite,
                                                   v5p v2-alpha-tpuv5, v6e v2-alpha-tpuv6e]
  --node_count N            TPU_NODE_COUNT         slices that train together [1]
  --spot | --reserved | --on_demand                TPU_PROVISIONING (spot, reserved or on_demand) [on_demand]
  --extras NAMES            TPU_EXTRAS             of the package, for pip [tpu]; tpu,wandb where a run reports to W&B
  --setup_command COMMAND   TPU_SETUP_COMMAND      run on every worker, in the code's folder, after each setup: mount a disk, copy data
  --ssh_flags FLAGS         TPU_SSH_FLAGS          for gcloud's ssh and scp, such as --internal-ip

Flags:
  --commit C                setup: what is sent [HEAD, and then a tree with changes is refused]
  --allow_dirty             setup: send HEAD all the same; changes stay here
  --no_wait                 create: do not wait for the slice
  --detach                  run: return as soon as it has started
  --env NAME=VALUE          run: for the workers' environment; no secrets; may be repeated
  --secret NAME=projects/P/secrets/S[/versions/V]     run, resume: from Secret Manager; may be repeated
  --worker N, --node NAME   logs: of which worker [0] of which slice [the first]
  --lines N, --follow       logs: how many [100], and go on
  --attempts N              resume: starts at most [10]
  --poll SECONDS            between two looks [30]
  --dry_run                 print the commands and call none; secrets are named only

HF_TOKEN and WANDB_API_KEY are sent where they are set here or named by --secret: over ssh's standard input into the environment of the
run, never as an argument and never into a file. output_dir must be seen by all workers and outlive them; give flags of `run` for it.
Exit codes: 0 done; 2 what was asked for is at fault; 75 stopped on request with everything saved; else a worker's, or 1.
END
}

refuse() { echo "error: $*" >&2 && exit 2; }
fail() { echo "error: $*" >&2 && exit 1; }
tell() { echo "$*" >&2; }

# ---- settings ---------------------------------------------------------------------------------------------------------------

verb=${1-}
case $verb in
  '' | -h | --help | help) usage && exit $((${#verb} ? 0 : 2)) ;;
  create | setup | run | status | logs | stop | resume | delete) shift ;;
  *) refuse "unknown verb '$verb'; known: create setup run status logs stop resume delete" ;;
esac

kept=(zone project accelerator_type runtime_version node_count provisioning extras setup_command ssh_flags)
name='' commit='' allow_dirty='' no_wait='' detach='' dry_run='' follow='' lines=100 worker=0 node='' attempts=10 poll=30
environment=() secrets=() create_flags=() words=()
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) usage && exit 0 ;;
    --)
      [ "$verb" = create ] || refuse "-- goes with create only; flags of the run stand after CONFIG"
      shift
      create_flags=("$@")
      break
      ;;
    --*) ;;
    *)
      [ "$verb" = run ] || refuse "what is '$1'? $verb takes flags only; --help lists them"
      words=("$@")
      break
      ;;
  esac
  flag=${1%%=*}
  flag=${flag#--}
  flag=${flag//-/_}
  case $flag in
    spot | reserved | on_demand)
      # shellcheck disable=SC2034 # read by its name
      flag_provisioning=$flag
      shift
      continue
      ;;
    allow_dirty | no_wait | detach | dry_run | follow)
      printf -v "$flag" yes
      shift
      continue
      ;;
  esac
  case $1 in
    *=*) value=${1#*=} ;;
    *)
      [ $# -ge 2 ] || refuse "$1 needs a value"
      value=$2
      shift
      ;;
  esac
  shift
  case $flag in
    name | commit | lines | worker | node | attempts | poll) printf -v "$flag" %s "$value" ;;
    env) environment+=("$value") ;;
    secret) secrets+=("$value") ;;
    *)
      case " ${kept[*]} " in
        *" $flag "*) printf -v "flag_$flag" %s "$value" ;;
        *) refuse "unknown flag --$flag; --help lists them (flags of the run stand after CONFIG)" ;;
      esac
      ;;
  esac
done

name=${name:-${TPU_NAME-}}
[ -n "$name" ] || refuse "--name (or TPU_NAME): which slice?"
[[ $name =~ ^[a-z]([-a-z0-9]{0,58}[a-z0-9])?$ ]] || refuse "--name: '$name' is no name for a TPU: small letters, digits and hyphens, a letter first"
for value in "$lines" "$worker" "$attempts" "$poll"; do
  [[ $value =~ ^[0-9]+$ ]] || refuse "--lines, --worker, --attempts and --poll are numbers, not '$value'"
done
memory=${PHASED_IFT_LAUNCH_DIR:-$HOME/.local/state/phased_ift}/$name # what create and run were given, a file each

for setting in "${kept[@]}"; do
  from_flag=flag_$setting
  from_environment=TPU_$(echo "$setting" | tr '[:lower:]' '[:upper:]')
  if [ -n "${!from_flag+given}" ]; then
    value=${!from_flag}
  elif [ "$verb" != create ] && [ -f "$memory/$setting" ]; then
    value=$(cat "$memory/$setting")
  else
    value=${!from_environment-}
  fi
  printf -v "$setting" %s "$value"
done
: "${zone:=}" "${project:=}" "${accelerator_type:=}" "${runtime_version:=}" "${setup_command:=}" "${ssh_flags:=}"
node_count=${node_count:-1} provisioning=${provisioning:-on_demand} extras=${extras:-tpu}
[ -n "$zone" ] || refuse "--zone (or TPU_ZONE): where?"
[[ $node_count =~ ^[1-9][0-9]*$ ]] || refuse "--node_count: '$node_count' is no number of slices"
case $provisioning in spot | reserved | on_demand) ;; *) refuse "TPU_PROVISIONING: '$provisioning' is none of spot, reserved, on_demand" ;; esac

check_accelerator() {
  [ -n "$accelerator_type" ] || refuse "--accelerator_type (or TPU_ACCELERATOR_TYPE): such as v4-16, v5p-16, v5litepod-16, v6e-16"
  [ -z "$runtime_version" ] || return 0
  case $accelerator_type in
    v2-* | v3-* | v4-*) runtime_version=tpu-ubuntu2204-base ;;
    v5litepod-*) runtime_version=v2-alpha-tpuv5-lite ;;
    v5p-*) runtime_version=v2-alpha-tpuv5 ;;
    v6e-*) runtime_version=v2-alpha-tpuv6e ;;
    v5e-* | v5lite-*) refuse "--accelerator_type: v5e is asked for as v5litepod-${accelerator_type#*-}" ;;
    *) refuse "--runtime_version: none is known for '$accelerator_type'; give one" ;;
  esac
}

where=("--zone=$zone")
[ -z "$project" ] || where+=("--project=$project")
where+=(--quiet)
ssh_where=("${where[@]}")
# shellcheck disable=SC2206 # words are meant
[ -z "$ssh_flags" ] || ssh_where+=($ssh_flags)

umask_before=$(umask)
umask 077
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
umask "$umask_before"

remember() { mkdir -p "$memory" && chmod 700 "$memory"; }

keep() { # NAME VALUE...: for resume
  [ -z "$dry_run" ] || return 0
  remember
  local file=$memory/$1
  shift
  if [ $# -eq 0 ]; then : >"$file"; else printf '%s\0' "$@" >"$file"; fi
}

kept_words() { # NAME: into the array `words`
  local word
  words=()
  [ -f "$memory/$1" ] || return 0
  while IFS= read -r -d '' word; do words+=("$word"); done <"$memory/$1"
}

# ---- gcloud -----------------------------------------------------------------------------------------------------------------

show() { printf '%s' "$1" && shift && printf ' %q' "$@" && echo; }

call() {
  if [ -n "$dry_run" ]; then
    show gcloud "$@"
  else
    gcloud "$@"
  fi
}

resource='' nodes=() sizes=() # state of the queued resource; its nodes, and how many workers each has
condition=''                  # waiting | ready | gone (taken away) | none | unsure (no answer)

look() {
  local told found state endpoints networks i
  nodes=() sizes=() condition=unsure
  if [ "$node_count" -eq 1 ]; then nodes=("$name"); else for ((i = 0; i < node_count; i++)); do nodes+=("$name-$i"); done; fi
  local describe=(compute tpus queued-resources describe "$name" "${where[@]}" '--format=value(state.state,tpu.nodeSpec[].nodeId)')
  if [ -n "$dry_run" ]; then
    call "${describe[@]}"
    for i in "${nodes[@]}"; do sizes+=(1); done
    condition=ready
    return
  fi
  if ! told=$(call "${describe[@]}" 2>"$scratch/described"); then
    if grep -q NOT_FOUND "$scratch/described"; then
      resource=none condition=none
    else
      resource=unknown
      cat "$scratch/described" >&2
    fi
    return 0
  fi
  resource=${told%%$'\t'*}
  found=()
  IFS=';' read -r -a found <<<"${told#*$'\t'}" || true
  [ "${#found[@]}" -ne "$node_count" ] || nodes=("${found[@]}")
  case $resource in
    ACTIVE) ;;
    SUSPENDING | SUSPENDED | FAILED) condition=gone && return ;;
    *) condition=waiting && return ;;
  esac
  for i in "${nodes[@]}"; do
    if ! told=$(call compute tpus tpu-vm describe "$i" "${where[@]}" '--format=value(state,networkEndpoints.len(),networkConfigs.len())' 2>"$scratch/described"); then
      grep -q NOT_FOUND "$scratch/described" || { cat "$scratch/described" >&2 && return 0; }
      told=TERMINATED
    fi
    IFS=$'\t' read -r state endpoints networks <<<"$told" || true
    case $state in
      READY) sizes+=($((endpoints / (${networks:-0} > 1 ? networks : 1)))) ;; # a worker has an endpoint for each of its networks
      PREEMPTED | TERMINATED) resource="ACTIVE, but $i is $state" condition=gone && return ;;
      *) resource="ACTIVE, but $i is $state" condition=waiting && return ;;
    esac
  done
  condition=ready
}

await_slice() {
  local before='' silences=0
  while look; do
    [ -z "$dry_run" ] || return 0
    [ "$condition" = unsure ] || silences=0
    [ "$resource" = "$before" ] || tell "$name: $resource"
    before=$resource
    case $condition in
      ready) return 0 ;;
      none) fail "$name: no such queued resource in $zone; create it" ;;
      gone) return 1 ;;
      unsure)
        silences=$((silences + 1))
        [ "$silences" -lt 10 ] || fail "$name: gcloud does not tell its state"
        ;;
    esac
    sleep "$poll"
  done
}

need_slice() {
  look
  [ "$condition" = ready ] || fail "$name is not ready: $resource"
}

note_answers() { # NODE OUTPUT: what its workers answered, as lines `NODE WORKER WORDS`; the rest is shown
  grep -o '@@worker [0-9]*: .*' "$2" | sed "s/^@@worker \([0-9]*\): /$1 \1 /" >>"$scratch/answers" || true
  grep -v '^@@worker ' "$2" || true
}

note_silence() { # WORDS: for each worker that has not answered
  local i n
  for ((i = 0; i < ${#nodes[@]}; i++)); do
    for ((n = 0; n < sizes[i]; n++)); do
      grep -q "^${nodes[i]} $n " "$scratch/answers" || echo "${nodes[i]} $n $*" >>"$scratch/answers"
    done
  done
}

everywhere() { # COMMAND [COMMAND FOR THE OTHER NODES]: on every worker of every node at once; leaves their answers
  local i command=$1 pids=()
  : >"$scratch/answers"
  for ((i = 0; i < ${#nodes[@]}; i++)); do
    [ "$i" -eq 0 ] || command=${2-$1}
    if [ -n "$dry_run" ]; then
      call compute tpus tpu-vm ssh "${nodes[i]}" "${ssh_where[@]}" --worker=all "--command=$command"
      continue
    fi
    call compute tpus tpu-vm ssh "${nodes[i]}" "${ssh_where[@]}" --worker=all "--command=$command" </dev/null >"$scratch/out.$i" 2>"$scratch/err.$i" &
    pids+=($!)
  done
  [ -z "$dry_run" ] || return 0
  for i in "${pids[@]}"; do wait "$i" || true; done # the answers say it better
  for ((i = 0; i < ${#nodes[@]}; i++)); do note_answers "${nodes[i]}" "$scratch/out.$i"; done
  note_silence unreachable
}

settle() { # WHAT: say which workers have failed at it, and return the code of one
  local node_name number words_ code=0
  [ -z "$dry_run" ] || return 0
  while read -r node_name number words_; do
    case $words_ in
      'exit 0') continue ;;
      unreachable)
        tell "error: $1: $node_name worker $number gave no answer (exit code 255)"
        code=255
        ;;
      *)
        tell "error: $1: $node_name worker $number: exit code ${words_#exit }"
        code=${words_#exit }
        ;;
    esac
  done < <(sort "$scratch/answers")
  [ "$code" -eq 0 ] || cat "$scratch"/err.* >&2 2>/dev/null || true
  return "$code"
}

# ---- verbs ------------------------------------------------------------------------------------------------------------------

ask_for_slice() {
  local as=() node_flags=("--node-id=$name")
  [ "$node_count" -eq 1 ] || node_flags=("--node-count=$node_count" "--node-prefix=$name")
  [ "$provisioning" = on_demand ] || as=("--$provisioning")
  call compute tpus queued-resources create "$name" "${where[@]}" "${node_flags[@]}" "--accelerator-type=$accelerator_type" "--runtime-version=$runtime_version" \
    ${as[@]+"${as[@]}"} ${create_flags[@]+"${create_flags[@]}"}
}

create() {
  check_accelerator
  ask_for_slice || fail "$name: the request was not accepted"
  if [ -z "$dry_run" ]; then
    local setting
    rm -rf "$memory"
    remember
    for setting in "${kept[@]}"; do printf %s "${!setting}" >"$memory/$setting"; done
  fi
  keep create_flags ${create_flags[@]+"${create_flags[@]}"}
  [ -n "$no_wait" ] || await_slice || fail "$name: $resource"
}

setup() {
  local i pids=() command sent
  if ! commit=$(git -C "$root" rev-parse --verify --quiet "${commit:-HEAD}^{commit}"); then
    refuse "--commit: the repository has no such commit"
  fi
  need_slice
  if [ -n "$dry_run" ]; then
    show git -C "$root" archive --format=tar.gz -o phased_ift.tar.gz "$commit"
  else
    git -C "$root" archive --format=tar.gz -o "$scratch/phased_ift.tar.gz" "$commit"
  fi
  cp "$here/tpu_worker.sh" "$scratch/phased_ift_worker.sh"
  [ -n "$dry_run" ] || tell "sending $commit to every worker"
  for ((i = 0; i < ${#nodes[@]}; i++)); do
    sent=(compute tpus tpu-vm scp "$scratch/phased_ift.tar.gz" "$scratch/phased_ift_worker.sh" "${nodes[i]}:" "${ssh_where[@]}" --worker=all)
    if [ -n "$dry_run" ]; then
      call "${sent[@]}" | sed "s#$scratch/##g"
      continue
    fi
    call "${sent[@]}" </dev/null >"$scratch/out.$i" 2>"$scratch/err.$i" &
    pids+=($!)
  done
  for ((i = 0; i < ${#pids[@]}; i++)); do
    local code=0
    wait "${pids[i]}" || code=$?
    [ "$code" -eq 0 ] || { cat "$scratch/err.$i" >&2 && tell "error: sending to ${nodes[i]}: exit code $code" && return "$code"; }
  done
  [ -n "$dry_run" ] || tell "installing on every worker; this takes minutes"
  command=$(show bash phased_ift_worker.sh setup "$commit" "$extras" ${setup_command:+"$setup_command"})
  everywhere "$command"
  settle setup || return $?
  keep commit "$commit"
}

refuse_changes() { # what is sent is a commit: a change that was forgotten would not be in the run
  [ -z "$commit" ] && [ -z "$allow_dirty" ] || return 0
  [ -z "$(git -C "$root" status --porcelain)" ] || refuse "the tree has changes that no commit holds: commit them, name one with --commit, or leave them here with --allow_dirty"
}

payload='' # NAME=VALUE lines for the workers' standard input
named=''   # their names, which may be shown
collect() {
  local entry key value
  payload='' named=''
  for entry in ${secrets[@]+"${secrets[@]}"}; do
    key=${entry%%=*} value=${entry#*=}
    [[ $key =~ ^[A-Za-z_][A-Za-z0-9_]*$ && $value == projects/*/secrets/* ]] || refuse "--secret: '$entry' is not NAME=projects/P/secrets/S[/versions/V]"
    [[ $value == */versions/* ]] || value=$value/versions/latest
    if [ -n "$dry_run" ]; then
      call secrets versions access "$value"
      value=''
    else
      value=$(gcloud secrets versions access "$value" </dev/null) || fail "--secret: cannot read $key"
    fi
    add "$key" "$value"
  done
  for key in HF_TOKEN WANDB_API_KEY; do
    if [ -n "${!key-}" ] && [[ " $named " != *" $key "* ]]; then add "$key" "${!key}"; fi
  done
  for entry in ${environment[@]+"${environment[@]}"}; do
    key=${entry%%=*}
    [[ $entry =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || refuse "--env: '$key' is not NAME=VALUE"
    case $key in HF_TOKEN | WANDB_API_KEY | *PASSWORD* | *SECRET*) refuse "--env: $key is a secret; set it in your environment or name it with --secret" ;; esac
    add "$key" "${entry#*=}"
  done
}

add() {
  [[ $2 != *$'\n'* ]] || refuse "$1: a value of several lines cannot be sent"
  local word
  for word in ${words[@]+"${words[@]}"} "$setup_command"; do
    case $1 in HF_TOKEN | WANDB_API_KEY) [ -z "$2" ] || [[ $word != *"$2"* ]] || refuse "$1 stands in the command itself, where everybody can read it; leave it out, it is sent" ;; esac
  done
  payload+="$1=$2"$'\n' named+=" $1"
}

starts=0
start() { # the command of the array `words`
  local command id i n pids places left try code=0
  collect
  starts=$((starts + 1)) id=$(date -u +%Y%m%dT%H%M%SZ)-$$-$starts
  command=$(show bash phased_ift_worker.sh start "$id" "$name" "${words[@]}")
  : >"$scratch/answers"
  if [ -n "$dry_run" ]; then
    for i in "${nodes[@]}"; do
      tell "# for each worker N of $i, all at once; over standard input:${named:- nothing}"
      call compute tpus tpu-vm ssh "$i" "${ssh_where[@]}" --worker=N "--command=$command"
    done
    return 0
  fi
  # one call for each worker, since those of --worker=all would share one standard input; again for those whose connection broke
  for try in 1 2 3; do
    pids=() places=()
    for ((i = 0; i < ${#nodes[@]}; i++)); do
      for ((n = 0; n < sizes[i]; n++)); do
        grep -q "^${nodes[i]} $n exit" "$scratch/answers" && continue
        printf '%sEND\n' "$payload" | call compute tpus tpu-vm ssh "${nodes[i]}" "${ssh_where[@]}" --worker="$n" "--command=$command" \
          >"$scratch/out.$i.$n" 2>"$scratch/err.$i.$n" &
        pids+=($!) places+=("$i.$n")
      done
    done
    for i in "${pids[@]}"; do wait "$i" || true; done
    for i in "${places[@]}"; do
      grep -q '@@worker [0-9]*: exit 74' "$scratch/out.$i" || note_answers "${nodes[${i%.*}]}" "$scratch/out.$i"
    done
    left=$(wc -l <"$scratch/answers")
    [ "$left" -lt "$(total)" ] || break
    tell "try $try: $left of $(total) workers have answered"
    sleep "$poll"
  done
  note_silence unreachable
  settle start || code=$?
  if [ "$code" -ne 0 ]; then
    tell "the others are stopped: a slice trains with all of its workers or not at all"
    everywhere "bash phased_ift_worker.sh stop $id" >/dev/null
    return "$code"
  fi
  tell "started on $(total) workers$([ -z "$named" ] || echo "; sent over standard input:$named")"
}

total() {
  local i sum=0
  for i in "${sizes[@]}"; do sum=$((sum + i)); done
  echo "$sum"
}

seen=0 # lines of the log that were shown
no_log=-
ask_states() {
  # shellcheck disable=SC2016 # it is the worker's
  local log unless='[ -f phased_ift_worker.sh ] || { h=$(hostname); echo "@@worker ${h##*-w-}: bare lines 0"; exit; }; bash phased_ift_worker.sh state'
  everywhere "$unless $seen" "$unless -"
  log=$(sed -n "s/^${nodes[0]} 0 .* lines \([0-9]*\)$/\1/p" "$scratch/answers" | head -n 1)
  seen=${log:-$seen}
}

count_states() { awk -v state="$1" '$3 == state' "$scratch/answers" | wc -l; }

# what `watch` returns beside exit codes of the run
taken_away=200 started_anew=201 stopped_by_us=''
watch() {
  local code words_ verdict
  while true; do
    ask_states
    if [ "$(count_states exited)" -eq "$(total)" ]; then break; fi
    if [ "$(count_states unreachable)" -gt 0 ]; then
      look
      if [ "$condition" = gone ] || [ "$condition" = none ]; then return "$taken_away"; fi
      [ "$condition" = ready ] || await_slice || return "$taken_away"
    elif [ "$(count_states lost)" -gt 0 ]; then
      return "$started_anew"
    fi
    sleep "$poll"
  done
  # 2 counts where it is all there is: a worker whose peers are gone ends with it, too
  verdict=0
  while read -r _ _ _ code words_; do
    case $code:$verdict in
      0:*) ;;
      75:0 | 2:0 | 2:75) verdict=$code ;;
      75:* | 2:*) ;;
      *) verdict=$code ;;
    esac
    case $words_ in asked*) stopped_by_us=yes ;; esac
  done <"$scratch/answers"
  if [ "$verdict" -ne 0 ]; then
    sort "$scratch/answers" | while read -r node_name number _ code _; do [ "$code" -eq 0 ] || tell "$node_name worker $number: exit code $code"; done
  fi
  return "$verdict"
}

check_config() {
  [ "${#words[@]}" -gt 0 ] || refuse "run: which CONFIG? Such as configs/llama2_7b.yaml"
  local shipped=HEAD
  [ ! -f "$memory/commit" ] || shipped=$(tr -d '\0' <"$memory/commit")
  case ${words[0]} in
    /* | '~'*) ;;
    -*) refuse "run: '${words[0]}' is no CONFIG" ;;
    *) git -C "$root" cat-file -e "$shipped:${words[0]}" 2>/dev/null || refuse "run: the code that was sent ($shipped) has no '${words[0]}'; commit it and set up again, or give a path of the workers" ;;
  esac
}

leave() { # CODE: the end of a run, in a line
  case $1 in
    0) tell "done" ;;
    75) tell "stopped with everything saved; resume goes on" ;;
    "$taken_away") tell "error: the slice was taken away ($resource); resume goes on" && exit 1 ;;
    "$started_anew") tell "error: a worker has started anew; resume goes on" && exit 1 ;;
  esac
  exit "$1"
}

run() {
  check_config
  need_slice
  if [ -z "$dry_run" ]; then
    seen=$no_log
    ask_states
    [ "$(count_states running)" -eq 0 ] || refuse "a run is at work on $name; see status, or stop it"
    [ "$(count_states bare)" -eq 0 ] || refuse "$name is not set up; setup comes first"
    seen=$(awk -v first="${nodes[0]}" '$1 == first && $2 == 0 { print $NF }' "$scratch/answers")
  fi
  local code=0
  start || exit $?
  keep environment ${environment[@]+"${environment[@]}"}
  keep secrets ${secrets[@]+"${secrets[@]}"}
  # shellcheck disable=SC2086 # names
  keep names $named
  keep words "${words[@]}"
  [ -z "$dry_run" ] || return 0
  [ -z "$detach" ] || return 0
  trap 'tell "the run goes on without this; status, logs and stop are for it" && exit 130' INT
  watch || code=$?
  leave "$code"
}

recall() { # the command and what it was started with
  local given=(${secrets[@]+"${secrets[@]}"})
  kept_words environment
  [ "${#environment[@]}" -gt 0 ] || environment=(${words[@]+"${words[@]}"})
  kept_words secrets
  [ "${#given[@]}" -gt 0 ] || secrets=(${words[@]+"${words[@]}"})
  kept_words create_flags
  create_flags=(${words[@]+"${words[@]}"})
  kept_words commit
  commit=${commit:-${words[0]-}}
  kept_words names
  local key
  for key in ${words[@]+"${words[@]}"}; do
    case " ${environment[*]-} ${secrets[*]-}" in *" $key="*) continue ;; esac
    [ -n "${!key-}" ] || refuse "$key: the run was started with it, and it is not set now; set it, or name it with --secret"
  done
  kept_words words
  [ "${#words[@]}" -gt 0 ] || refuse "$name: no command was started from here; run CONFIG starts one"
}

resume() {
  recall
  check_accelerator
  local attempt code=1
  if [ -n "$dry_run" ]; then
    tell "# where the slice was taken away; else from the start on"
    call compute tpus queued-resources delete "$name" "${where[@]}" --force
    ask_for_slice
    setup
    start
    return 0
  fi
  for ((attempt = 1; attempt <= attempts; attempt++)); do
    [ "$attempt" -eq 1 ] || { tell "attempt $attempt of $attempts" && sleep "$poll"; }
    code=1
    look
    if [ "$condition" = unsure ]; then continue; fi
    if [ "$condition" = waiting ]; then await_slice || true; fi
    if [ "$condition" = gone ] || [ "$condition" = none ]; then
      tell "$name: $resource; asking for it again"
      renew || continue
    fi
    seen=0
    ask_states >/dev/null
    if [ "$(count_states lost)" -gt 0 ] && [ "$(count_states running)" -gt 0 ]; then
      tell "a worker has started anew: the others are stopped, and all start together"
      everywhere "bash phased_ift_worker.sh stop" >/dev/null
      while [ "$(count_states running)" -gt 0 ]; do
        sleep "$poll"
        ask_states
      done
    fi
    if [ "$(count_states running)" -eq 0 ]; then
      if [ "$(count_states bare)" -gt 0 ] || [ "$(count_states unreachable)" -gt 0 ]; then
        setup || { code=$? && continue; }
      fi
      start || { code=$? && continue; }
    fi
    code=0 stopped_by_us=''
    watch || code=$?
    case $code in
      0 | 2) leave "$code" ;;
      75) [ -z "$stopped_by_us" ] || leave 75 ;; # else the machine had notice that it will be taken away
    esac
  done
  tell "error: not done after $attempts attempts"
  leave "$code"
}

renew() {
  while [ "$condition" = gone ] && [ "${resource#SUSPENDING}" != "$resource" ]; do # cannot be deleted yet
    sleep "$poll"
    look
  done
  if [ "$condition" != none ]; then
    call compute tpus queued-resources delete "$name" "${where[@]}" --force || return 1
  fi
  ask_for_slice && await_slice
}

status() {
  look
  echo "$name: $resource"
  if [ "$condition" != ready ]; then return 0; fi
  seen=$no_log
  ask_states
  [ -n "$dry_run" ] || sort "$scratch/answers" | sed -e 's/^\([^ ]*\) \([0-9]*\) /\1 worker \2: /' -e 's/ lines [0-9]*$//'
  if [ -n "$dry_run" ] || [ "$(count_states running)" -gt 0 ] || [ "$(count_states exited)" -gt 0 ]; then
    call compute tpus tpu-vm ssh "${nodes[0]}" "${ssh_where[@]}" --worker=0 "--command=bash phased_ift_worker.sh status" </dev/null || true # it has said why
  fi
}

logs() {
  local how="-n $lines"
  [ -z "$follow" ] || how="$how -F"
  look
  call compute tpus tpu-vm ssh "${node:-${nodes[0]}}" "${ssh_where[@]}" --worker="$worker" "--command=bash phased_ift_worker.sh log $how" </dev/null
}

stop() {
  local code=0
  need_slice
  everywhere "bash phased_ift_worker.sh stop"
  settle stop || exit $?
  [ -z "$dry_run" ] || return 0
  seen=$no_log
  ask_states
  if [ $(($(count_states none) + $(count_states bare))) -eq "$(total)" ]; then tell "no run is there" && return 0; fi
  watch || code=$?
  if [ "$code" -eq 75 ]; then tell "stopped with everything saved; resume goes on" && return 0; fi
  leave "$code"
}

delete() {
  call compute tpus queued-resources delete "$name" "${where[@]}" --force
  [ -n "$dry_run" ] || rm -rf "$memory"
}

case $verb in
  setup)
    refuse_changes
    setup || exit $?
    ;;
  *) "$verb" ;;
esac
