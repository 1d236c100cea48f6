#!/usr/bin/env bash
# The paper's experiment from the street to the roof: data, scores, phases, a plan, arms x seeds, answers, judgments, a report.  launch/paper.sh --help
#
# Told in order; nothing is done without --run. Each step is passed over where it is done, and each verb goes on where it was stopped, so
# that the same command again goes on, whatever ended it.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

usage() {
  cat <<'END'
usage: launch/paper.sh [EXPERIMENT] [flags] [-- --KEY VALUE ...]

EXPERIMENT is one of configs/paper: llama2_7b_alpaca (the default), llama2_7b_alpaca_cleaned, llama2_13b_alpaca, llama2_13b_alpaca_cleaned,
mistral_7b_alpaca. Each command is printed with its time and cost; keys after -- change the run that all arms are made from.

  --dry_run                 print the commands and do nothing; so it is without --run, too
  --run                     do them, in the current folder (data/ and runs/), with $PYTHON, else .venv beside this script's folder
  --scorer NAME             the model that scores how difficult the records are
  --score_usd X             never spend more on that
  --judge NAME              the model that judges the answers
  --judge_usd X             never spend more on that for one arm and seed
  --base_url URL            of both: a server of one's own that speaks OpenAI's protocol
  --reasoning_effort E      of both, for models that reason: none, low ...
  --split 'FLAGS'           of `split` [the paper's sizes, which fit any scorer; '--thresholds 1.5 3.5' fit scores on the paper's scale]
  --topology CHIP:SHAPE     TPUs to plan the training for, as `plan` takes it [by experiment], or none
  --usd_per_chip_hour X     their price, to say what a cell of training costs at least
  --shard I/N               train and answer every Nth cell only, from the Ith (from 0): one of N hosts that share this folder. Host 0
                            does what comes before, the others begin where the phases are made; whoever is last judges and reports

The machine: a host that the experiment's file names. A TPU VM of one host: launch/tpu_vm.sh create, then setup --extras tpu,scoring,analysis,
and there, in ~/phased_ift/code, PYTHON=~/phased_ift/venv/bin/python launch/paper.sh. GPUs: a .venv with '.[cuda,scoring,analysis]'.
OPENAI_API_KEY holds the key of the models that are asked, HF_TOKEN that of a model behind a licence.
Exit codes: 0 done; 1 a failure inside; 2 what was asked for is at fault; 75 stopped on request, or by a budget, with everything saved.
END
}

refuse() { echo "error: $*" >&2 && exit 2; }

# shellcheck disable=SC2034 # two are read by their names
name='' run='' scorer='' score_usd='' judge='' judge_usd='' base_url='' reasoning_effort='' split='' topology='' usd_per_chip_hour='' shard=0/1 keys=()
while [ $# -gt 0 ]; do
  flag=${1%%=*} flag=${flag#--}
  flag=${flag//-/_}
  case $1 in
    -h | --help) usage && exit 0 ;;
    --) shift && keys=("$@") && break ;;
    --run) run=yes && shift && continue ;;
    --dry_run | --dry-run) run='' && shift && continue ;;
    --*=*) value=${1#*=} ;;
    --*)
      [ $# -ge 2 ] || refuse "$1: --help lists the flags, and those that take a value need one"
      value=$2 && shift
      ;;
    *)
      [ -z "$name" ] || refuse "what is '$1'? One EXPERIMENT at a time"
      name=$1 && shift && continue
      ;;
  esac
  shift
  case $flag in
    scorer | score_usd | judge | judge_usd | base_url | reasoning_effort | split | topology | usd_per_chip_hour | shard) printf -v "$flag" %s "$value" ;;
    *) refuse "unknown flag --$flag; --help lists them (keys of the run stand after --)" ;;
  esac
done

name=${name:-llama2_7b_alpaca}
known=$(cd "$root/configs/paper" && printf '%s ' *.yaml)
case " $known" in *" $name.yaml "*) ;; *) refuse "EXPERIMENT: '$name' is none of ${known//.yaml/}" ;; esac
[[ $shard =~ ^[0-9]+/[1-9][0-9]*$ && ${shard%/*} -lt ${shard#*/} ]] || refuse "--shard: '$shard' is not I/N with I from 0 to N - 1, such as 0/2"
here='' && [ "$PWD" = "$root" ] || here=$root/
config=${here}configs/paper/$name.yaml
model=${name%%_alpaca*} data=alpaca
case $name in *_cleaned) data=alpaca_cleaned ;; esac
value() { sed -n "s/^ *$1: *\([^#]*[^# ]\).*/\1/p" "$root/configs/paper/$name.yaml"; } # of a key
told() { awk -v word="$1:" '/^# [^ ]/ { on = $2 == word } on' "$root/configs/paper/$name.yaml"; } # what the experiment's head says under a word
out=$(value output_dir) base=$(value model_name_or_path) seeds=$(value seeds | tr -d '],[') limit=$(value '.*max_completion_tokens' | tr -dc 0-9)

python=${PYTHON:-$root/.venv/bin/python}
if [ -n "$run" ]; then
  [ -n "$scorer" ] && [ -n "$score_usd" ] || refuse "--scorer and --score_usd: which model scores, and how much may it cost at most, in USD?"
  [ -n "$judge" ] && [ -n "$judge_usd" ] || refuse "--judge and --judge_usd: which model judges, and how much may one arm and seed cost at most, in USD?"
  [ -n "${OPENAI_API_KEY-}" ] || refuse "OPENAI_API_KEY is not set: to the key of the models that are asked, or to any word for a server without keys"
  command -v "$python" >/dev/null || refuse "no Python at '$python'; make it there with '.[scoring,analysis]' and tpu or cuda, or set PYTHON"
fi
scorer=${scorer:-NAME} score_usd=${score_usd:-X} judge=${judge:-NAME} judge_usd=${judge_usd:-X} how=() judging=()
for flag in base_url reasoning_effort; do
  [ -z "${!flag}" ] || { how+=("--$flag" "${!flag}") && judging+=("--evaluation.judging.$flag" "${!flag}"); }
done
judging=(--evaluation.judging.model "$judge" --evaluation.judging.budget_usd "$judge_usd" ${judging[@]+"${judging[@]}"})
case $model in llama2_13b) topology=${topology:-v5p:2x2x1} ;; *) topology=${topology:-v6e:2x4} ;; esac

chapter() { printf '\n== %s\n' "$*"; }

quoted() { # words as one would type them
  local word
  for word; do
    case $word in *\'*) printf ' %q' "$word" ;; *[!A-Za-z0-9_./:=,+-]* | '') printf " '%s'" "$word" ;; *) printf ' %s' "$word" ;; esac
  done
}

again=() # what starts a command again after a crash
step() { # FILE ESTIMATE VERB WORDS...: done where FILE is there (-: the verb itself knows); a FILE that ends in .txt is what the verb says
  local file=$1 estimate=$2 words=(-m "phased_ift_jax.$3" "${@:4}")
  printf '\n# %s\n%s%s\n' "$estimate" "${again:+${here}launch/until_done.sh }python" "$(quoted "${words[@]}")"
  [ -n "$run" ] || return 0
  if [ "$file" != - ] && [ -e "$file" ]; then echo "done before: $file is there" && return 0; fi
  case $file in
    *.txt) mkdir -p "$(dirname "$file")" && "$python" "${words[@]}" | tee "$file.part" && mv "$file.part" "$file" ;;
    *) ${again[@]+"${again[@]}"} "$python" "${words[@]}" ;;
  esac
}

# ---- what the experiment reads ----------------------------------------------------------------------------------------------

scored=data/${data}_scored.jsonl phases=data/${data}_phases
case $data in
  alpaca) raw=data/alpaca_data.json sizes='--sizes paper' ;;                          # 30.3k, 14.7k and 6.8k
  alpaca_cleaned) raw=hub:yahma/alpaca-cleaned sizes='--sizes 0.462 0.317 0.221' ;; # 23.9k, 16.4k and 11.4k
esac
before() {
  chapter "1. Data: instructions, the paper's own scores as far as they were released, and six test sets of 1,047 prompts"
  case $data in alpaca) step "$raw" "a download" fetch alpaca --out data ;; *) echo && echo "# $raw is read from the hub by what needs it" ;; esac
  step data/en-alpaca52k-stage3.jsonl "a download; 6,889 records with GPT-4's scores, to hold the new scorer against" fetch alpaca-scored --out data
  step data/anthropic_test_set.jsonl "downloads" fetch testsets --out data

  chapter "2. Scores: how difficult each record is, asked once and never paid for twice"
  local card=${scored%.jsonl}.card.json score=(score "$raw" --out "$scored" --model "$scorer" ${how[@]+"${how[@]}"}) # the card is written last
  step "$card" "nothing is sent: what all would cost
$(told score)" "${score[@]}" --dry_run
  step "$card" "200 questions, which are part of the whole, and a forecast from their answers" "${score[@]}" --budget_usd "$score_usd" --pilot 200
  step "$card" "the rest, for at most $score_usd USD in all" "${score[@]}" --budget_usd "$score_usd"
  step "${phases}_calibration.txt" "seconds: how far the scorer agrees with the paper's, on the stage that was released" \
    calibrate "$scored" --against data/en-alpaca52k-stage3.jsonl

  chapter "3. Phases: easy, medium and hard, with a picture in $phases"
  # shellcheck disable=SC2086 # words are meant
  step "$phases/phases.json" "seconds" split "$scored" --out "$phases" --tokenizer "$base" ${split:-$sizes}

  chapter "4. The plan: what each arm trains, and whether it fits"
  step "$out/plan.txt" "the grid and the arms' budgets side by side: a pass over the data for each arm, 15 s each on 2 cores (benchmarks/data_path.py)" \
    experiment "$config" --plan "${judging[@]}" ${keys[@]+"${keys[@]}"}
  if [ "$topology" != none ]; then
    step "$out/plan-${topology/:/-}.txt" "minutes: the phased arm's step, compiled for TPUs that need not be here" plan "${here}configs/$model.yaml" \
      --data.path "$scored" --data.append_period true --curriculum.bins "{from: $phases/phases.json}" --topology "$topology" \
      ${usd_per_chip_hour:+--usd_per_chip_hour "$usd_per_chip_hour"} ${keys[@]+"${keys[@]}"}
  fi
}

# ---- what it does -----------------------------------------------------------------------------------------------------------

sed -n '1s/^# //p' "$root/configs/paper/$name.yaml"
[ -n "$run" ] || echo "Nothing is done without --run. Times and costs are estimates, and each says by what; where there is none, nothing was measured."
if [ "${shard%/*}" -eq 0 ]; then
  before
elif [ -n "$run" ] && [ ! -e "$phases/phases.json" ]; then
  refuse "--shard: $phases/phases.json is not there yet; host 0 makes it, with the same command and --shard 0/${shard#*/}"
fi

chapter "5. The arms, by seed: each is trained, answers the test sets and is judged against one-off; then the report"
again=("$root/launch/until_done.sh")
step - "goes on where it was stopped; needs
$(told hardware)
$(told train)
$(told answer)
$(told judge)" experiment "$config" --shard "$shard" "${judging[@]}" ${keys[@]+"${keys[@]}"}
again=()
if [ -n "$run" ] && [ ! -e "$out/report.html" ]; then
  echo && echo "other hosts are at work; whoever is last goes on from here"
  exit 0
fi

if grep -q 'against random itself' "$root/configs/paper/$name.yaml"; then
  chapter "6. Table 3's last part: the phased arm against the random one itself"
  found=() direct=$out/phased-against-random runs=()
  for seed in $seeds; do
    runs+=("$out/phased/seed$seed/run" "$out/random/seed$seed/run") found+=("$direct/seed$seed.jsonl")
    [ -z "$run" ] || mkdir -p "$direct"
    step "$direct/seed$seed.card.json" "as one arm and seed above, for at most $judge_usd USD" judge "$out/phased/seed$seed/answers.jsonl" "$out/random/seed$seed/answers.jsonl" \
      --out "$direct/seed$seed.jsonl" --model "$judge" ${how[@]+"${how[@]}"} --budget_usd "$judge_usd" --max_completion_tokens "$limit"
  done
  step "$direct/report.html" "a minute" report "${runs[@]}" --judgments "${found[@]}" --out "$direct/report.html"
fi
[ -z "$run" ] || printf '\ndone: %s\n' "$out/report.html" ${direct:+"$direct/report.html"}
