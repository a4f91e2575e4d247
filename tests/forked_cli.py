"""`qpruner` as a program, many times from one start of Python: a server that forks for every command.

Every command still has a process, a folder, streams, signals and an exit status of its own; what is not repeated is the
import of torch and transformers. A line on stdin asks: [words, folder, path of its stdout, path of its stderr]. Two
lines answer: the process id, and in the end the exit status.
"""

import gc
import json
import os
import signal
import sys


def main() -> None:
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    import qpruner.compress  # noqa: F401
    from qpruner import api, cli, judging  # noqa: F401

    torch.set_num_threads(1)
    gc.freeze()  # or every command ends with a search of all this for cycles, and a copy of it
    judging.ROUNDS = 1  # of processes that measure speeds
    for line in sys.stdin:
        words, folder, out, err = json.loads(line)
        if child := os.fork():
            print(child, flush=True)
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
            continue
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(folder)
        for number, path in ((0, os.devnull), (1, out), (2, err)):
            os.dup2(os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.argv = ["qpruner", *words]
        cli.main()
        raise AssertionError("typer ends the process")


if __name__ == "__main__":
    main()
