# What "laptop", "gpu" and "paper" mean, the first argument of the scripts here. To be sourced with it.
# laptop is what results/ shows; the other two leave theirs in results/gpu and results/paper. They have not been run.
case "${1:-laptop}" in
  laptop) # two cores, minutes a run: the embedded model
    AT= MODEL=tiny/llama SEEDS="0 1 2" LONG="--steps 200 --save-every 100" SHORT="--steps 100"
    DPO="--lr 5e-5" GRPO="--lr 1e-4" # chosen by tables/sweep.sh
    ;;
  gpu) # one GPU: a real model on sums of one-digit numbers. Both are made by
    #    python tiny/smollm2.py --out models/smollm2 --problems models/one_digit.jsonl
    AT=gpu/ MODEL=models/smollm2 SEEDS="0 1 2" LONG="--steps 200 --save-every 100" SHORT="--steps 100"
    DPO="--model $MODEL --data models/one_digit.jsonl@train --lr 1e-5" GRPO=$DPO
    export DATA=models/one_digit.jsonl@test JOBS=1 OMP_NUM_THREADS=8
    ;;
  paper) # a node of eight large GPUs: the paper's Table 4
    AT=paper/ MODEL=meta-llama/Llama-3.1-8B-Instruct SEEDS="0 1 2" LONG="--steps 1000 --save-every 100" SHORT=$LONG
    GRPO="--model $MODEL --data AI-MO/NuminaMath-CoT --prompts-per-step 64 --max-new-tokens 2048
      --lr 1e-6 --grad-clip 0.1"
    DPO="$GRPO --adam-eps 1e-4"
    export DATA=HuggingFaceH4/MATH-500@all N=50 JOBS=1 OMP_NUM_THREADS=8 RANKS=8
    ;;
  *)
    echo "$0: laptop, gpu or paper, not $1" >&2
    exit 2
    ;;
esac
GRPO=$(echo $GRPO) DPO=$(echo $DPO) # one line each
