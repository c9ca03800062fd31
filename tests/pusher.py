"""`qspin push` in a process of its own, as the command line has it; what it says is looked through for secrets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from command_line import Answer
from hub_server import SIGNATURE, TOKEN

from qspin.run_dir import RunDir

# One process pushes many times: to import torch for each takes longer than all the rest. The client reads its
# variables as it is imported, but for the token.
WORKER = """
import json, os, sys, traceback
from qspin.exports import push
from qspin.cli import main

answers = os.fdopen(os.dup(1), "w")
for line in sys.stdin:
    order = json.loads(line)
    os.environ["HF_TOKEN"] = order["token"]
    for descriptor in (1, 2):
        file = os.open(f"{order['said']}{descriptor}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(file, descriptor)
        os.close(file)
    sys.argv = ["qspin", "push", *order["arguments"]]
    try:
        main()
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
        code = -1
    sys.stdout.flush()
    sys.stderr.flush()
    print(json.dumps(code), file=answers, flush=True)
"""


class Pusher:
    """Pushes runs, each time with the token that is given; neither it nor a signature is ever seen."""

    def __init__(self, folder: Path, variables: dict[str, str]) -> None:
        self.said = folder / f"said-{len(list(folder.iterdir()))}-"
        self.home = folder / "hf-home"
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**environment, "OMP_NUM_THREADS": "1", "HF_HOME": str(self.home), **variables},
        )

    def __call__(self, run: RunDir, repo: str, *options: str, token: str = TOKEN) -> Answer:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        order = {"arguments": [str(run.path), repo, *options], "token": token, "said": str(self.said)}
        print(json.dumps(order), file=self.process.stdin, flush=True)
        code = json.loads(self.process.stdout.readline())
        out, err = (Path(f"{self.said}{descriptor}").read_text() for descriptor in (1, 2))
        assert TOKEN not in out + err
        assert SIGNATURE not in out + err
        return Answer(code, out, err)

    def close(self) -> None:
        self.process.communicate()
