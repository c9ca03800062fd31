"""llama.cpp itself, in a process of its own, by its prebuilt wheel: what it makes of a GGUF file.

`python llama_cpp_peer.py` reads a question as JSON: a file, texts to tokenise, prompts (tokens) to go on from greedily.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INSTALLED = importlib.util.find_spec("xllamacpp") is not None  # a development dependency where there is a wheel


@dataclass(frozen=True, slots=True)
class Answers:
    tokens: list[list[int]]
    completions: list[list[int]]


def ask(
    path: Path, *, texts: Sequence[str] = (), prompts: Sequence[Sequence[int]] = (), new: int = 16, bos: bool = False
) -> Answers:
    """`bos`: tokenise as a whole prompt, to which llama.cpp adds a BOS token if the file says so."""
    question = json.dumps({"path": str(path), "texts": texts, "prompts": prompts, "new": new, "bos": bos})
    done = subprocess.run([sys.executable, __file__], input=question, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return Answers(**json.loads(done.stdout.splitlines()[-1]))


def _main() -> None:
    import xllamacpp

    question = json.load(sys.stdin)
    params = xllamacpp.CommonParams()
    params.model.path = question["path"]
    params.n_ctx = 512
    params.n_parallel = 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.warmup = False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32  # no rounding but the file's
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)

    def post(route: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            server.listening_address + route,
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as reply:
            return json.load(reply)

    answers = {
        "tokens": [
            post("/tokenize", {"content": text, "add_special": question["bos"], "parse_special": True})["tokens"]
            for text in question["texts"]
        ],
        "completions": [
            post(
                "/completion",
                {"prompt": prompt, "n_predict": question["new"], "temperature": 0, "return_tokens": True},
            )["tokens"]
            for prompt in question["prompts"]
        ],
    }
    sys.stdout.write(json.dumps(answers) + "\n")


if __name__ == "__main__":
    _main()
