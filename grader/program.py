"""The program that a worker process runs: it answers requests with the functions of one file.

    python -P program.py SECONDS BYTES FILE [ARGUMENT...]

FILE defines functions(*ARGUMENTS) -> {name: function}. Neither this file nor call.py imports another file of
the project, and grade.py imports as_meant.py alone: a worker stays small, and no file of ours hides a module
that the user's code imports.
"""

import json
import os
import runpy
import signal
import sys


def limit_memory(size: int) -> None:
    """Limit this process to `size` bytes of address space, if the system supports it."""
    if sys.platform != "linux":  # other systems refuse or ignore RLIMIT_AS
        return
    import resource

    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    if hard == resource.RLIM_INFINITY or hard > size:
        resource.setrlimit(resource.RLIMIT_AS, (size, hard))


def serve(timeout_s: float, file: str, arguments: list[str]) -> None:
    """Answer requests until stdin closes: one JSON line [function, argument...] in, one with its result out.

    The first line out is "ready". A request that runs for 2 * timeout_s seconds kills the process.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    # The kernel's default action on SIGALRM ends the process, even inside C code. The parent kills a late
    # worker sooner. The alarm is for when the parent itself was killed: a stuck worker would run for days.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    # A function's prints go to stderr, so that they do not mix with the replies. Its child processes
    # cannot read requests.
    requests, replies = os.fdopen(os.dup(0)), os.dup(1)
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    functions = runpy.run_path(file)["functions"](*arguments)
    try:
        os.write(replies, b'"ready"\n')
        for line in requests:
            name, *given = json.loads(line)
            signal.setitimer(signal.ITIMER_REAL, 2 * timeout_s)
            reply = functions[name](*given)
            signal.setitimer(signal.ITIMER_REAL, 0)
            os.write(replies, json.dumps(reply).encode() + b"\n")
    except BrokenPipeError:
        pass  # the parent is gone


def main() -> None:
    seconds, size, file, *arguments = sys.argv[1:]
    limit_memory(int(size))
    serve(float(seconds), file, arguments)


if __name__ == "__main__":
    main()
