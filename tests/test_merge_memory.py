"""A model of a billion weights is merged in little memory, and as PEFT does it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import transformers
from conftest import ordered
from safetensors.torch import load_file

BIG = {  # the shape of Llama 3.2 1B
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
MEASURE = """
import re, sys, threading, time
from pathlib import Path

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

bare, peak, done = anonymous(), 0, threading.Event()

def watch():
    global peak
    while not done.wait(0.005):
        peak = max(peak, anonymous())

threading.Thread(target=watch, daemon=True).start()
import torch
from qspin.exports.merge import Dequantised, Merged, write_safetensors

base, adapter, out = map(Path, sys.argv[1:4])
onto = None
if len(sys.argv) > 4:
    names = frozenset(name for name in Merged(base, adapter).names if re.search(r"\\.[0-3]\\..*proj", name))
    onto = Dequantised(names, torch.bfloat16, True, torch.device("cpu"))
write_safetensors(Merged(base, adapter, onto=onto), out)
done.set()
print(max(peak, anonymous()) - bare)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_model_of_a_billion_weights_merges_in_little_memory_and_as_peft_does(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """1.2 billion weights in ten files: under 600 MB of anonymous memory above the bare interpreter, torch included."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    config = transformers.LlamaConfig(**BIG)
    with torch.device("meta"):
        shapes = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    shapes.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for parameter in shapes.parameters():
        parameter.data.normal_(std=0.02, generator=generator)
    shapes.tie_weights()
    shapes.save_pretrained(base, max_shard_size="256MB")
    assert len(list(base.glob("*.safetensors"))) >= 9
    adapted = peft.get_peft_model(shapes, peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.02, generator=generator)
    adapted.save_pretrained(adapter)
    theirs = adapted.merge_and_unload().state_dict()

    out = tmp_path / "out"
    out.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, base, adapter, out], capture_output=True, text=True, check=True
    )
    above = int(done.stdout)
    record_property("MB above the bare interpreter", above / 1e6)
    assert above < 600e6
    different = total = 0
    for path in sorted(out.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            total += tensor.numel()
            if not torch.equal(tensor, theirs[name]):
                apart = (ordered(tensor) - ordered(theirs[name])).abs_()
                assert int(apart.max()) <= 1, name
                different += int((apart > 0).sum())
    assert total == sum(parameter.numel() for parameter in shapes.parameters())
    record_property("elements that differ by a unit in the last place", different)
    assert different <= 1e-4 * total
    shutil.rmtree(out)

    out.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, base, adapter, out, "dequantised"], capture_output=True, text=True, check=True
    )
    record_property("MB, four layers onto their dequantised weights", int(done.stdout) / 1e6)
    assert int(done.stdout) < 600e6
