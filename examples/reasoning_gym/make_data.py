"""Write a task of reasoning-gym as rows for --data.

python examples/reasoning_gym/make_data.py --task chain_sum --rows 3000 --out chain_sum.jsonl min_terms=2 ...

Words such as min_terms=2 are settings of the task, whole numbers. `extra_info` holds the whole entry, for
reward.py.
"""

import argparse
import json
from pathlib import Path

import reasoning_gym


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", default="chain_sum")
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("settings", nargs="*")
    given = parser.parse_args()
    settings = {name: int(value) for name, value in (word.split("=") for word in given.settings)}
    entries = reasoning_gym.create_dataset(given.task, size=given.rows, seed=given.seed, **settings)
    with given.out.open("w") as file:
        for entry in entries:
            row = {"question": entry["question"], "data_source": given.task, "extra_info": entry}
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
