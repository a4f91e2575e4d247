"""One process that answers all that `qpruner.exporting.fresh` asks, where each would start one and import for seconds.

It runs the program that an export runs, request by request. As there, qpruner cannot be imported in the one that opens
folders for transformers alone; another one is for folders of qpruner's own type.
"""

import contextlib
import importlib.util
import io
import json
import subprocess
import sys
import tempfile
from types import SimpleNamespace


class Loaders:
    """Stands where `fresh` has `subprocess`. `asked` counts requests."""

    def __init__(self):
        self.processes: dict[str, subprocess.Popen] = {}
        self.modules = tempfile.TemporaryDirectory()
        self.asked = 0

    def run(self, command, *, input, env, **_):
        """As `subprocess.run`, for `command` = [Python, its option, the program]."""
        python, option, program = command
        self.asked += 1
        if option not in self.processes:
            env = env | {"HF_MODULES_CACHE": self.modules.name}
            pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            self.processes[option] = subprocess.Popen([python, option, __file__, program], env=env, **pipes)
        process = self.processes[option]
        process.stdin.write(len(input).to_bytes(8, "little") + input)
        process.stdin.flush()
        head = json.loads(process.stdout.readline())
        found = process.stdout.read(head["bytes"])
        return SimpleNamespace(returncode=head["status"], stdout=found, stderr=head["said"].encode())

    def close(self):
        for process in self.processes.values():
            process.communicate()
        self.modules.cleanup()


def main() -> None:
    spec = importlib.util.spec_from_file_location("fresh", sys.argv[1])
    sys.modules["fresh"] = fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    while size := requests.read(8):
        sys.stdin = io.StringIO(requests.read(int.from_bytes(size, "little")).decode())
        sys.stdout = io.TextIOWrapper(io.BytesIO())
        status, said = 0, ""
        with contextlib.redirect_stderr(io.StringIO()):
            try:
                fresh.main()
            except Exception as error:  # whatever a loader raises is what it says of the folder
                status, said = 1, f"{type(error).__name__}: {error}"
        sys.stdout.flush()
        found = sys.stdout.buffer.getvalue()
        answers.write(json.dumps({"status": status, "said": said, "bytes": len(found)}).encode() + b"\n" + found)
        answers.flush()


if __name__ == "__main__":
    main()
