# What "laptop", "gpu" and "paper" mean, the first argument of every script here. Sourced: source tables/scales.sh "$@"
# laptop is what results/ shows. The other two are written with care and have not been run.
case "${1:-laptop}" in
  laptop) # two cores; minutes a run
    SEEDS="0 1 2" MODEL=tiny/llama
    COMMON="--steps 200 --save-every 100"
    DPO="--lr 1e-4" GRPO="--lr 1e-4" # chosen by tables/sweep.sh
    ;;
  gpu) # one GPU; SmolLM2 on sums of one-digit numbers, made by: python tiny/smollm2.py --problems models/one_digit.jsonl
    SEEDS="0 1 2" MODEL=HuggingFaceTB/SmolLM2-135M-Instruct
    COMMON="--model $MODEL --data models/one_digit.jsonl@train --max-new-tokens 64 --steps 200 --save-every 100"
    DPO="--lr 1e-5" GRPO="--lr 1e-5"
    export DATA=models/one_digit.jsonl@test JOBS=1 OMP_NUM_THREADS=8
    ;;
  paper) # a node with eight large GPUs; the paper's Table 4, one seed a row there
    SEEDS="0 1 2" MODEL=meta-llama/Llama-3.1-8B-Instruct
    COMMON="--model $MODEL --data AI-MO/NuminaMath-CoT --prompts-per-step 64 --max-new-tokens 2048 --lr 1e-6
      --grad-clip 0.1 --steps 1000 --save-every 100"
    DPO="--adam-eps 1e-4" GRPO="--kl-coef 0.001"
    export DATA=HuggingFaceH4/MATH-500@all N=50 JOBS=1 OMP_NUM_THREADS=8 RANKS=8
    ;;
  *)
    echo "$0: laptop, gpu or paper, not $1" >&2
    exit 2
    ;;
esac
