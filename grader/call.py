"""A user's reward function in a worker (program.py): load it, recognise its shape, call it.

Two shapes are told apart by the name of a parameter: `solution_str` (verl: one response per call) and
`completions` (TRL: a batch per call). Any problem becomes a reply {"error": ...}, with the traceback if the
user's code raised; the parent then ends the run.
"""

import asyncio
import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

LARGEST = (2 - 2.0**-23) * 2.0**127  # float32's largest number: the trainer holds rewards in float32
VERL = ("data_source", "solution_str", "ground_truth", "extra_info")

RAISED = (Exception, SystemExit)  # what a user's code may raise: a script without a main guard exits


class Refused(Exception):
    """A problem with a function, or with what it returned; `at`: for which response of a batch."""

    def __init__(self, problem: str, at: int | None = None):
        super().__init__(problem)
        self.at = at


def load(file: str, name: str) -> Callable:
    """FILE's NAME. Its folder comes first on the path, as if FILE were run as a script."""
    path = Path(file).resolve()
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # pickle and dataclasses look it up there
    spec.loader.exec_module(module)
    if not hasattr(module, name):
        raise Refused(f"the file has no {name}")
    return getattr(module, name)


def shape_of(function: Callable) -> dict[str, Any]:
    """{"batch": TRL's shape, "takes": its parameters or None for any, "needs": those without a default}.

    >>> shape_of(lambda completions, answer, **columns: 0)
    {'batch': True, 'takes': None, 'needs': ['completions', 'answer']}
    """
    if inspect.isclass(function) or not callable(function):
        kind = "a class" if inspect.isclass(function) else f"of type {type(function).__name__}"
        raise Refused(f"is {kind}, not a function: name one, or an object with __call__")
    parameters = inspect.signature(function).parameters.values()
    named = {one.name: one for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)}
    if ("solution_str" in named) == ("completions" in named):
        raise Refused("needs one of the parameters solution_str (as for verl) and completions (as for TRL)")
    needs = [name for name, one in named.items() if one.default is one.empty]
    if "solution_str" in named and not set(needs) <= set(VERL):
        raise Refused(f"needs more than {', '.join(VERL)}: give its other parameters a default")
    takes = None if any(one.kind == one.VAR_KEYWORD for one in parameters) else list(named)
    return {"batch": "completions" in named, "takes": takes, "needs": needs}


def number(value: Any, at: int | None = None) -> float:
    """A score as a float; Refused unless it is a finite number (Python, NumPy or torch) within float32."""
    try:
        score = math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError):
        score = math.nan
    if not math.isfinite(score):
        raise Refused(f"returned {str(value)[:80]!r} ({type(value).__name__}), not a finite number", at)
    if abs(score) > LARGEST:
        raise Refused(f"returned {score:g}, which float32 cannot hold: keep it within {LARGEST:.3g}", at)
    return score


def scores_of(returned: Any, batch: bool, size: int) -> list[float | None]:
    """A call's result for `size` responses, as numbers; None drops a response."""
    if not batch:
        if isinstance(returned, dict) and "score" not in returned:
            raise Refused(f"returned a dictionary without 'score', but {', '.join(map(str, returned))}")
        return [number(returned["score"] if isinstance(returned, dict) else returned)]
    if isinstance(returned, str | bytes | dict) or not hasattr(returned, "__len__"):
        raise Refused(
            f"returned {type(returned).__name__}, not a list with a number or None for each completion"
        )
    if len(returned) != size:
        raise Refused(f"returned {len(returned)} rewards for {size} completions")
    return [None if value is None else number(value, at) for at, value in enumerate(returned)]


def failure(error: Exception | SystemExit) -> dict[str, Any]:
    """The reply that reports an error."""
    if isinstance(error, Refused):
        return {"error": str(error), "at": error.at}
    said = f"{type(error).__name__}: {str(error).strip()}".partition("\n")[0].rstrip(": ")
    theirs = error.__traceback__.tb_next or error.__traceback__  # without our own frame
    told = "".join(traceback.format_exception(error.with_traceback(theirs)))
    return {"error": f"raised {said}", "at": None, "traceback": told}


def functions(file: str, name: str) -> dict[str, Callable]:
    """What a request can call: `shape`, and `score` with what is known of the responses."""
    try:
        function = load(file, name)
        shape = shape_of(function)
    except RAISED as error:
        failed = failure(error)
        return {"shape": lambda: failed}
    loop = asyncio.new_event_loop()  # one for all calls: a client works only in its own loop

    def score(known: dict[str, Any]) -> list[float | None] | dict[str, Any]:
        takes = known if shape["takes"] is None else known.keys() & shape["takes"]
        try:
            returned = function(**{name: known[name] for name in takes})
            if inspect.isawaitable(returned):
                returned = loop.run_until_complete(returned)
            return scores_of(returned, shape["batch"], len(known.get("completions", ())))
        except RAISED as error:
            return failure(error)

    return {"shape": lambda: shape, "score": score}
