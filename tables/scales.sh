# What "laptop", "gpu" and "paper" mean, the first argument of the scripts here. To be sourced with it.
# laptop is what most of results/ shows. gpu and paper leave their results in results/gpu and results/paper; of gpu
# Table 1 was run, paper never.
case "${1:-laptop}" in
  laptop) # two cores, minutes a run: the embedded model
    AT='' MODEL=tiny/llama FAMILY=tiny/qwen3 LONG=200 SHORT=100 SAVE=25 EARLY="25 50 100 200" FOUR="25 50 75 100"
    DPO="--lr 5e-5" GRPO="--lr 2e-4" FAST=2e-4 # the first two chosen by tables/sweep.sh
    export N=${N:-8}
    CHAT_MODEL=tiny/chat REWARD_MODEL=tiny/reward REQUESTS=tiny@test MATH_DPO=$DPO
    TRUTH=true_reward # a metric that is known of embedded requests alone
    CHAT="--model $CHAT_MODEL --reward-model $REWARD_MODEL --data"
    CHAT_DPO="$CHAT chat=tiny --lr 1e-4" CHAT_GRPO="$CHAT chat=tiny --lr 4e-4" # by tables/sweep_chat.sh
    BOTH_DPO="$CHAT math=tiny:1 chat=tiny:1 --lr 1e-4" BOTH_GRPO="$CHAT math=tiny:1 chat=tiny:1 --lr 4e-4"
    ;;
  gpu) # one GPU: a real model on sums of one-digit numbers, JOBS runs side by side (12 need 120 GB). Made by
    #    python tiny/smollm2.py --out models/smollm2 --problems models/one_digit.jsonl
    AT=gpu/ MODEL=models/smollm2 FAMILY=Qwen/Qwen2.5-0.5B-Instruct
    LONG=60 SHORT=30 SAVE=30 EARLY="30 60" FOUR=30
    MATH_DPO="--data models/one_digit.jsonl@train --lr 2e-5 --engine-memory 2GiB --compile False"
    MATH_DPO="$MATH_DPO --micro-batch-tokens 2048"
    DPO="--model $MODEL $MATH_DPO" GRPO=$DPO FAST=8e-5
    export DATA=models/one_digit.jsonl@test N=${N:-40} JOBS=${JOBS:-6} OMP_NUM_THREADS=1
    export EVALUATE="--engine-memory 2GiB"
    CHAT_MODEL=$MODEL REWARD_MODEL=Skywork/Skywork-Reward-V2-Qwen3-0.6B
    REQUESTS=allenai/WildChat-1M@test CHAT="--model $MODEL --reward-model $REWARD_MODEL --max-new-tokens 512"
    CHAT_GRPO="$CHAT --data chat=allenai/WildChat-1M --lr 1e-6" CHAT_DPO="$CHAT_GRPO --beta 0.01"
    BOTH="--data math=models/one_digit.jsonl@train:1 chat=allenai/WildChat-1M:1 --max-new-tokens math=64,chat=512"
    BOTH_GRPO="$CHAT $BOTH --lr 1e-6" BOTH_DPO="$CHAT $BOTH --lr 1e-6 --beta 0.01"
    ;;
  paper) # a node of eight large GPUs: the paper's Table 4
    AT=paper/ MODEL=meta-llama/Llama-3.1-8B-Instruct
    LONG=1000 SHORT=500 SAVE=125 EARLY="125 250 500 750 1000" FOUR="125 250 375 500"
    FAMILY=Qwen/Qwen2.5-7B-Instruct
    AS_PAPER="--system-block False --strict-paper-grading True"
    COMMON="--activation-checkpointing --lr 1e-6 --grad-clip 0.1 $AS_PAPER"
    MATH="$COMMON --data AI-MO/NuminaMath-CoT --prompts-per-step 64 --max-new-tokens 2048"
    MATH_DPO="$MATH --adam-eps 1e-4"
    DPO="--model $MODEL $MATH_DPO" GRPO="--model $MODEL $MATH" FAST=4e-6
    export DATA=HuggingFaceH4/MATH-500@all N=50 JOBS=1 OMP_NUM_THREADS=8 RANKS=8 EVALUATE=$AS_PAPER
    CHAT_MODEL=$MODEL REWARD_MODEL=Nexusflow/Athene-RM-8B
    REQUESTS=allenai/WildChat-1M@test
    CHAT="$COMMON --model $MODEL --reward-model $REWARD_MODEL --max-new-tokens 1024"
    CHAT_GRPO="$CHAT --data chat=allenai/WildChat-1M --prompts-per-step 32" CHAT_DPO="$CHAT_GRPO --beta 0.01"
    # The paper's mixture is 2 to 1 in a batch of 32, which is no multiple of 3.
    BOTH="--data math=AI-MO/NuminaMath-CoT:2 chat=allenai/WildChat-1M:1 --max-new-tokens math=2048,chat=1024"
    BOTH_GRPO="$CHAT --prompts-per-step 48 $BOTH" BOTH_DPO="$CHAT --prompts-per-step 48 $BOTH --beta 0.01"
    ;;
  *)
    echo "$0: laptop, gpu or paper, not $1" >&2
    exit 2
    ;;
esac
# The rows of Table 1 that figures 6, 8 and 10, Table 5 and stale_grpo stand beside. At laptop size they are still runs
# of the earlier model, as the figures' own are (results/README.md); a figure that is made again takes results/table1.
TABLE1=results/${AT}table1
[ -n "$AT" ] || TABLE1=results/earlier
SEEDS=${SEEDS:-0 1 2 3 4} # training seeds, or those given: SEEDS="0 1 2" bash tables/table1.sh
# LONG is the steps of a table's run, which is evaluated at SHORT, too; a figure's run takes SHORT steps, and so do
# the runs with chat. With WHEN=$EARLY a run is evaluated on its way, too. FOUR: steps up to SHORT, for a course.
HALF=$SHORT LAST=$LONG WHEN="$SHORT $LONG"
LONG="--steps $LONG --save-every $SAVE" UNTIL="--until $SHORT" SHORT="--steps $SHORT --save-every $SAVE"
export REWARD_MODEL WHEN

# A script that only draws (DRAW) ends here if the archive $1 is not there.
must_have() {
  [ -z "${DRAW:-}" ] || [ -e "$1/runs.jsonl.gz" ] || { echo "${0##*/}: not run yet" && exit; }
}
# What a script draws when some of its rows have not been run (DRAW): of the rows $2... those that the archive
# $1 has, and of the pairs $2... (A:B) those whose rows are in the list "$1".
have() {
  local kept row
  kept=$([ -z "${DRAW:-}" ] || .venv/bin/python tables/archive.py list "$1")
  for row in "${@:2}"; do
    if [ -z "${DRAW:-}" ] || grep -q "^$row/" <<<"$kept"; then
      echo "$row"
    else
      echo "$1: $row has not been run: this script makes it" >&2
    fi
  done
}
of_rows() {
  local pair
  for pair in "${@:2}"; do
    [[ " $1 " != *" ${pair%:*} "* || " $1 " != *" ${pair#*:} "* ]] || echo "$pair"
  done
}
