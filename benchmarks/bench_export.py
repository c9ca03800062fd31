"""Every export of the embedded model's quickstart run, in processes that know nothing of qspin.

    make quickstart && python benchmarks/bench_export.py --run runs/quickstart

Each export is written and compared as `qspin export` does it; then plain transformers, and llama.cpp, answer 20
held-out prompts greedily with it. The answers are held against those of the trained model: base weights as they were in
4 bits, adapter beside them, by transformers and PEFT in fp32. How near qspin's own answers come, computed as in
training, stands in the first row. The last line is how many of 20 the exact export shares.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness import say, write

from qspin.errors import QspinError
from qspin.exports.compare import Trained
from qspin.exports.export import export
from qspin.figures.players import chosen_iteration
from qspin.generation import Request, generate
from qspin.run_dir import RunDir

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import llama_cpp_peer

PROMPTS = 20
KINDS: list[tuple[str, str, str | None]] = [
    ("merged-16bit", "dequantised", "float32"),
    ("gguf", "dequantised", "f32"),
    ("merged-16bit", "dequantised", None),
    ("gguf", "dequantised", "q4_k_m"),
    ("merged-16bit", "original", None),
    ("merged-4bit", "original", None),
    ("gguf", "original", "f16"),
    ("ollama", "original", "q8_0"),
    ("gguf", "original", "q4_k_m"),
    ("adapter", "", None),
]
Answers = list[list[int]]

# folder: a model, or with an adapter its base; weights that take the place of the base's own are in `replaced`
ELSEWHERE = """
import json, sys
import peft, torch, transformers
from safetensors.torch import load_file

transformers.logging.set_verbosity_error()
order = json.load(sys.stdin)
torch.set_num_threads(order["threads"])
options = {"gguf_file": order["file"]} if order["file"] else {}
if order["nf4"]:
    options["quantization_config"] = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=order["double_quant"]
    )
model = transformers.AutoModelForCausalLM.from_pretrained(order["folder"], dtype=order["dtype"], **options)
if order["replaced"]:
    missing = model.load_state_dict(load_file(order["replaced"]), strict=False)
    assert not missing.unexpected_keys
if order["adapter"]:
    model = peft.PeftModel.from_pretrained(model, order["adapter"])
stops, prompts = order["stops"], order["prompts"]
longest = max(map(len, prompts))
ids = torch.tensor([[stops[0]] * (longest - len(prompt)) + prompt for prompt in prompts])
mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
found = model.generate(
    input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=order["new"], eos_token_id=stops,
    pad_token_id=stops[0],
)
answers = []
for answer in found[:, longest:].tolist():
    end = next((at for at, token in enumerate(answer, 1) if token in stops), len(answer))
    answers.append(answer[:end])
assert not [name for name in sys.modules if name.startswith("qspin")]
print(json.dumps(answers))
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--run", type=Path, default=Path("runs/quickstart"), help="a finished quickstart run")
    parser.add_argument("--write", action="store_true", help="keep the results in benchmarks/results")
    options = parser.parse_args()
    run_dir = RunDir(options.run.resolve())
    bench = Bench(Trained(run_dir, chosen_iteration(run_dir, "last")))
    with tempfile.TemporaryDirectory(dir=run_dir.path.parent) as scratch:
        rows = bench.rows(Path(scratch))
    exact = rows[1]["same"]
    meaning = (
        f"share of {PROMPTS} greedy answers that are the trained model's, of its fp32 merge onto dequantised weights"
    )
    if options.write:
        about = {"prompts": PROMPTS, "new_tokens": bench.new, "heldout_rows": len(bench.trained.rows)}
        about |= {"base": bench.trained.record["base"], "trained_in": bench.trained_in}
        write("export", {"ratio": exact / PROMPTS, "ratio_means": meaning, **about, "exports": rows})
    say(f"{meaning}: {exact} of {PROMPTS}")


class Bench:
    """A trained model, its answers, and what is measured of an export."""

    def __init__(self, trained: Trained) -> None:
        self.trained, self.speech = trained, trained.speech
        self.prompts = [row.prompt_ids for row in trained.rows[:PROMPTS]]
        self.new = self.trained.config.generation.max_new_tokens
        self.stops = sorted(self.speech.stop_ids)

    def rows(self, scratch: Path) -> list[dict[str, Any]]:
        ours = self.qspins_answers()
        self.trained_in = str(self.trained.model.dtype).removeprefix("torch.")
        replaced = self.dequantised_weights(scratch / "replaced.safetensors")
        base = Path(self.speech.base.weights())
        self.expected = self.elsewhere(base, "float32", replaced=replaced, adapter=self.trained.adapter)
        replaced.unlink()
        rows = [{"export": "as qspin computes it", "onto": "", "dtype": self.trained_in, **self.agreement(ours)}]
        for kind in KINDS:
            try:
                rows.append(self.measured(scratch / "export", *kind))
            except QspinError as error:  # q4_k_m without llama-cpp-python
                say(f"left out: {kind}: {error}")
                continue
            say(json.dumps(rows[-1]))
            shutil.rmtree(scratch / "export")
        return rows

    def measured(self, out: Path, to: str, onto: str, dtype: str | None) -> dict[str, Any]:
        times: list[float] = []
        assert to == "adapter" or self.trained.reading
        export(
            self.trained,
            to=to,
            out=out,
            onto=onto or "original",
            dtype=dtype,
            say=lambda _: times.append(time.perf_counter()),
        )
        size = sum(path.stat().st_size for path in out.iterdir())
        if to == "adapter":
            base = Path(self.speech.base.weights())
            answers = self.elsewhere(base, self.trained_in, nf4=True, adapter=out)
            return {"export": to, "onto": "NF4", "dtype": "float32", "bytes": size} | self.agreement(answers)
        check = json.loads((out / "merge-check.json").read_text())
        gguf = next(out.glob("*.gguf"), None)
        answers = self.elsewhere(out, "float32" if gguf else "auto", file=gguf)
        row = {"export": to, "onto": onto, "dtype": check["dtype"], "bytes": size, "seconds": times[-1] - times[-2]}
        row |= {key: check[key] for key in ("nll_difference", "top1_agreement")} | self.agreement(answers)
        if gguf is not None and llama_cpp_peer.INSTALLED:
            found = self.agreement(llama_cpp_peer.ask(gguf, prompts=self.prompts, new=self.new).completions)
            row |= {f"llama_cpp_{key}": value for key, value in found.items()}
        return row

    def elsewhere(
        self,
        folder: Path,
        dtype: str,
        *,
        file: Path | None = None,
        nf4: bool = False,
        replaced: Path | None = None,
        adapter: Path | None = None,
    ) -> Answers:
        """Greedy answers of a model by plain transformers, in a process of its own."""
        order = {
            "folder": str(folder), "dtype": dtype, "file": file and file.name, "nf4": nf4,
            "double_quant": self.trained.config.model.double_quant, "replaced": replaced and str(replaced),
            "adapter": adapter and str(adapter), "threads": self.trained.record["threads"], "prompts": self.prompts,
            "stops": self.stops, "new": self.new,
        }  # fmt: skip
        with tempfile.TemporaryDirectory() as away:  # where no checkout of qspin is found
            environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
            done = subprocess.run(
                [sys.executable, "-c", ELSEWHERE], input=json.dumps(order), stdout=subprocess.PIPE, text=True,
                check=True, cwd=away, env=environment,
            )  # fmt: skip
        answers: Answers = json.loads(done.stdout)
        return answers

    def qspins_answers(self) -> Answers:
        answers = generate(
            self.trained.model,
            [Request(prompt, 0) for prompt in self.prompts],
            max_new_tokens=self.new,
            temperature=0.0,
            top_p=1.0,
            width=PROMPTS,
            stop_ids=self.speech.stop_ids,
            on_step=lambda _tokens, _rows: None,
        )
        return [list(answer.ids) for answer in answers]

    def dequantised_weights(self, path: Path) -> Path:
        """What the layers in 4 bits compute with, taken from the loaded model itself, not by way of merging."""
        from safetensors.torch import save_file

        model = self.trained.model
        named = model.peft_model.get_base_model().named_modules()
        names = {id(module.lora_A["default"].weight): name for name, module in named if hasattr(module, "lora_A")}
        weights = {
            f"{names[id(a)]}.weight": matrix.float().contiguous()
            for layers in model._layers
            for a, matrix in zip(layers.a, layers.matrices(), strict=True)
        }
        assert weights.keys() == self.trained.weights.quantised
        save_file(weights, path)
        return path

    def agreement(self, answers: Sequence[Sequence[int]]) -> dict[str, Any]:
        """How many answers are the trained model's, and how many tokens they share from the beginning, on average."""
        shared = [_common(found, wanted) for found, wanted in zip(answers, self.expected, strict=True)]
        same = sum(list(found) == wanted for found, wanted in zip(answers, self.expected, strict=True))
        length = sum(map(len, self.expected)) / PROMPTS
        return {"same": same, "common_prefix": sum(shared) / PROMPTS, "length": length}


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


if __name__ == "__main__":
    main()
