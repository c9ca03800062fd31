"""Exports of a tiny run: what is written, compared and refused."""

from __future__ import annotations

import importlib.util
import json
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers
import yaml
from command_line import call, contents, process, refusal
from conftest import flip_byte
from exported import made

from qspin.adapters import load_adapter
from qspin.config import RunConfig, load_config
from qspin.errors import QspinError
from qspin.exports import compare, gguf_file
from qspin.exports.compare import CHECK, Trained, drifted
from qspin.exports.export import DTYPES, export
from qspin.figures.evaluation import read_evaluation
from qspin.figures.players import chosen_iteration
from qspin.files import read_json, read_plain_json, write_json
from qspin.model import SlotModel
from qspin.prepare import prepare
from qspin.record import template_date
from qspin.run_dir import RunDir


def tiny_run(model: Path, folder: Path, *settings: str) -> Path:
    rows = [{"prompt": f"What is {n}?", "completion": f"It is {7 * n}."} for n in range(48)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = (
        *("model.dtype=float32", "generation.max_new_tokens=8", "generation.width=8", "data.heldout_rows=8"),
        *("train.batch_size=8", "train.lr=0.01", "lora.rank=4", *settings),
    )
    options = [part for setting in settings for part in ("--set", setting)]
    out = folder / "run"
    answer = call("run", "--model", model, "--data", folder / "rows.jsonl", "--iterations", "2", "--out", out, *options)
    assert answer.code == 0, answer.err
    return out


@pytest.fixture(scope="module")
def run(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return RunDir(tiny_run(tiny_folder("qwen2"), tmp_path_factory.mktemp("exported")))


# --- what is written ---


def test_an_adapter_names_its_base_and_never_a_path(
    run: RunDir, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    out = export(Trained(run, 0), to="adapter", out=tmp_path / "adapter")
    assert read_plain_json(out / "adapter_config.json")["base_model_name_or_path"] == "tiny-qwen2"
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder("qwen2"))
    model = peft.PeftModel.from_pretrained(base, out)
    ours = load_adapter(run.iteration(0).adapter)
    theirs = peft.get_peft_model_state_dict(model)
    assert all(torch.equal(theirs[name], weight) for name, weight in ours.items())
    assert transformers.AutoTokenizer.from_pretrained(out).chat_template.startswith("{% for m in messages %}")
    assert not (out / CHECK).exists()


def test_no_export_names_a_path_of_this_machine(run: RunDir, tmp_path: Path) -> None:
    trained = Trained(run, 1)
    for to in ("adapter", "merged-16bit", "merged-4bit"):
        export(trained, to=to, out=tmp_path / to)
        for path in (tmp_path / to).glob("*.json*"):
            assert str(tmp_path.parent) not in path.read_text(), path.name
            assert str(Path.home()) not in path.read_text(), path.name


def test_the_dequantised_merge_is_the_trained_model(run: RunDir, tmp_path: Path) -> None:
    check = made(run, tmp_path / "out", "merged-16bit", onto="dequantised", dtype="float32")
    assert abs(check["nll_difference"]) < 1e-5
    assert check["top1_agreement"] == 1
    assert check["dtype"] == "float32"
    assert check["rows"] == 8
    assert [row["prompt"] for row in check["completions"]] == [
        row["prompt"] for row in made(run, tmp_path / "again", "merged-16bit")["completions"]
    ]
    assert len(check["completions"]) == 3
    assert all(row["trained"] == row["exported"] for row in check["completions"])
    assert check["trained_in"] == "float32"
    assert not drifted(check)


def test_the_figures_are_those_of_evaluation(run: RunDir, tmp_path: Path) -> None:
    check = made(run, tmp_path / "out", "merged-16bit", iteration=0)
    recorded = read_evaluation(run.iteration(0).evaluation)
    assert check["nll_trained"] == pytest.approx(sum(recorded.real_nll) / sum(recorded.real_tokens), abs=1e-5)
    assert check["iteration"] == 0
    assert check["nll_difference"] == check["nll_exported"] - check["nll_trained"]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    config = RunConfig.model_validate(read_json(run.record)["config"])
    prepared = prepare(config, template_date(run))
    nll = tokens = 0.0
    for row in prepared.heldout:
        ids = torch.tensor([[*row.prompt_ids, *row.real_ids]])
        with torch.no_grad():
            logps = model(ids).logits[0, len(row.prompt_ids) - 1 : -1].log_softmax(-1)
        nll -= float(logps.gather(1, torch.tensor(row.real_ids)[:, None]).sum())
        tokens += len(row.real_ids)
    assert check["nll_exported"] == pytest.approx(nll / tokens, abs=1e-5)


def test_a_merged_folder_is_complete(run: RunDir, tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    made(run, tmp_path / "out", "merged-16bit")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "merge-check.json", "manifest.json",
    }  # fmt: skip
    old, new = (read_plain_json(folder / "config.json") for folder in (tiny_folder("qwen2"), tmp_path / "out"))
    assert new == old
    stops = read_json(run.record)["stop_ids"]
    assert read_plain_json(tmp_path / "out" / "generation_config.json")["eos_token_id"] == stops


def test_a_merge_in_4_bits_is_loaded_in_4_bits(run: RunDir, tmp_path: Path) -> None:
    check = made(run, tmp_path / "out", "merged-4bit")
    assert check["dtype"] == "nf4"
    assert not (tmp_path / "out" / "16bit").exists()
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    kinds = {type(module).__name__ for module in model.modules()}
    assert "Linear4bit" in kinds
    assert (tmp_path / "out" / "model.safetensors").stat().st_size < 0.6 * sum(
        path.stat().st_size for path in Path(read_json(run.record)["config"]["model"]["id"]).glob("*.safetensors")
    )


@pytest.mark.parametrize("dtype", [None, "f32", "bf16", "q8_0"])
def test_a_gguf_file_is_compared_as_well(dtype: str | None, run: RunDir, tmp_path: Path) -> None:
    check = made(run, tmp_path / "out", "gguf", onto="dequantised", dtype=dtype)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        f"tiny-qwen2-{dtype or 'f16'}.gguf", "merge-check.json", "manifest.json",
    }  # fmt: skip
    assert abs(check["nll_difference"]) < {"f32": 1e-4, None: 1e-3, "bf16": 0.01, "q8_0": 0.05}[dtype]


def test_a_folder_for_ollama_has_its_modelfile(run: RunDir, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    made(run, tmp_path / "out", "ollama", dtype="q8_0")
    assert "%|" not in capfd.readouterr().err, "a bar of a library"
    text = (tmp_path / "out" / "Modelfile").read_text()
    assert text.startswith('FROM ./tiny-qwen2-q8_0.gguf\nTEMPLATE """{{')
    assert text.endswith('PARAMETER stop "<|im_end|>"\n')


def test_4_bits_by_llama_cpp_need_llama_cpp(run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(QspinError, match=r"^q4_k_m is made by llama\.cpp: pip install llama-cpp-python"):
        made(run, tmp_path / "out", "gguf", dtype="q4_k_m")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is compiled on installing")
def test_4_bits_by_llama_cpp(run: RunDir, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    check = made(run, tmp_path / "out", "gguf", onto="dequantised", dtype="q4_k_m")
    assert check["dtype"] == "q4_k_m"
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".gguf", ".json"}
    assert 0 < abs(check["nll_difference"]) < 1
    assert "llama_model" not in capfd.readouterr().err


def test_switches_of_the_template_are_the_exported_ones_defaults(
    tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """A tokenizer that is loaded elsewhere writes what was trained on, unless it is told otherwise."""
    (tmp_path / "template.jinja").write_text(
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + (mood | default('')) + '\n' + m['content'] +"
        " '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant' + (mood | default(''))"
        " + '\n' }}{% endif %}"
    )
    settings = (f"chat.template={tmp_path / 'template.jinja'}", "chat.template_kwargs.mood=' glad'")
    run = RunDir(tiny_run(tiny_folder("llama"), tmp_path, *settings))
    out = export(Trained(run, 1), to="adapter", out=tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    asked = {"conversation": [{"role": "user", "content": "Why?"}], "tokenize": False, "add_generation_prompt": True}
    assert tokenizer.apply_chat_template(**asked) == "<|im_start|>user glad\nWhy?<|im_end|><|im_start|>assistant glad\n"
    assert tokenizer.apply_chat_template(**asked, mood=" sad") == (
        "<|im_start|>user sad\nWhy?<|im_end|><|im_start|>assistant sad\n"
    )


# --- which iteration ---


def test_last_best_and_numbers(run: RunDir, tmp_path: Path) -> None:
    copy = RunDir(Path(shutil.copytree(run.path, tmp_path / "run")))
    assert [chosen_iteration(copy, wanted) for wanted in ("last", "0", "1")] == [1, 0, 1]
    config = yaml.safe_load(copy.config.read_text())
    config["evaluation"] |= {"best_by": "nll", "keep": "best"}
    copy.config.write_text(yaml.safe_dump(config))
    for best in (0, 1):
        for index in (0, 1):
            evaluation = read_json(copy.iteration(index).evaluation)
            evaluation["real_nll"] = [float(index != best)] * len(evaluation["real_tokens"])
            write_json(copy.iteration(index).evaluation, evaluation)
        assert chosen_iteration(copy, "best") == chosen_iteration(copy, None) == best
    config["evaluation"]["keep"] = "last"
    copy.config.write_text(yaml.safe_dump(config))
    assert chosen_iteration(copy, None) == 1
    for wrong in ("2", "-1", "first", "01"):
        with pytest.raises(QspinError, match=r"^--iteration: .* is not finished in .*; last, best or 0 to 1 are"):
            chosen_iteration(copy, wrong)
    for player in ("base", "sft"):
        with pytest.raises(
            QspinError, match=f"^--iteration: '{player}' is not an iteration in .*; last, best or 0 to 1 are"
        ):
            chosen_iteration(copy, player)
    copy.iteration(1).evaluation.unlink()
    assert chosen_iteration(copy, "last") == 0


# --- refused, and nothing written ---


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"to": "onnx"}, "--to: there is no 'onnx'; there are adapter, merged-16bit, merged-4bit, gguf, ollama"),
        ({"onto": "base"}, "--onto: there is no 'base'; there are original and dequantised"),
        ({"dtype": "int3"}, "--dtype: merged-16bit is not written in 'int3'; it takes float32"),
        ({"to": "adapter", "dtype": "float32"}, "--dtype: adapter is not written in 'float32'; it takes none"),
        ({"to": "gguf", "dtype": "float32"}, "it takes f32, f16, bf16, q8_0, q4_k_m"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, str], said: str, run: RunDir, tmp_path: Path) -> None:
    with pytest.raises(QspinError) as error:
        export(Trained(run, 1), out=tmp_path / "out", **({"to": "merged-16bit"} | options))
    assert said in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_target_that_is_there_is_left_alone(run: RunDir, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    with pytest.raises(QspinError, match=r"^--out: .*out is there already; name a new folder$"):
        made(run, tmp_path / "out", "merged-16bit")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
    with pytest.raises(QspinError, match=r"^--out: .*mine\.txt is a file; name a folder$"):
        made(run, tmp_path / "out" / "mine.txt" / "below", "adapter")


def test_a_runs_own_folder_is_no_place_for_an_export(run: RunDir) -> None:
    """A run that goes on would take it away half-written, or go on from it."""
    before = contents(run.path)
    for inside in (run.path / "merged", run.iteration(2).adapter):
        said = refusal("export", run.path, "--to", "adapter", "--out", inside)
        assert said == f"--out: {inside} lies in the folder of the run {run.path}; name a folder beside it"
    assert contents(run.path) == before


def test_a_full_disk_is_foreseen(run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=1000))
    for to in ("merged-16bit", "merged-4bit", "gguf"):
        with pytest.raises(QspinError, match=r"^--out: [\d,]{6,} bytes are needed in .*, 1,000 are free"):
            made(run, tmp_path / "out", to)
    assert list(tmp_path.iterdir()) == []


def test_what_a_gguf_cannot_hold_is_told_before_any_weights_are_loaded(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(gguf_file.ARCHITECTURES, "qwen2")
    monkeypatch.delattr(SlotModel, "load")
    with pytest.raises(
        QspinError, match=r"^model\.id: qwen2 models are not written as GGUF; llama, mistral, qwen3 are"
    ):
        made(run, tmp_path / "out", "gguf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", DTYPES)
def test_a_damaged_adapter_is_not_exported(
    to: str, run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = RunDir(Path(shutil.copytree(run.path, tmp_path / "run")))
    told = flip_byte(copy.iteration(0).adapter)
    monkeypatch.delattr(SlotModel, "load")
    answer = call("export", copy.path, "--to", to, "--iteration", "0", "--out", tmp_path / "out")
    assert (answer.code, answer.out, answer.err) == (1, "", f"error: {told}\n")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    answer = call("export", tmp_path, "--to", "adapter")
    assert (answer.code, answer.out) == (1, "")
    assert answer.err == f"error: {tmp_path}: not the folder of a run, it has no run.json\n"


def test_other_4_bit_weights_than_were_trained_on_are_told(run: RunDir, tmp_path: Path) -> None:
    copy = RunDir(Path(shutil.copytree(run.path, tmp_path / "run")))
    write_json(copy.record, read_json(copy.record) | {"base_hash": "0" * 64})
    with pytest.raises(QspinError, match=r"^--onto: the 4-bit weights of tiny-qwen2 made here are not those"):
        made(copy, tmp_path / "out", "merged-16bit", onto="dequantised")
    heard: list[str] = []
    made(copy, tmp_path / "out", "merged-16bit", say=heard.append)
    assert sum("note: the 4-bit weights" in text for text in heard) == 1


def test_memory_that_runs_out_is_told_in_a_line(run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "load_recorded", lambda *_: torch.empty(1 << 60, dtype=torch.uint8))
    answer = call("export", run.path, "--to", "merged-16bit", "--out", tmp_path / "out")
    assert answer.code == 1
    assert answer.err.startswith("error: out of memory (")
    assert answer.err.endswith("; close other programs and export again\n")
    assert list(tmp_path.iterdir()) == []


def test_other_rows_than_were_trained_on_are_told(run: RunDir, tmp_path: Path) -> None:
    copy = RunDir(Path(shutil.copytree(run.path, tmp_path / "run")))
    record = read_json(copy.record)
    write_json(copy.record, record | {"data": record["data"] | {"fingerprint": "other"}})
    with pytest.raises(QspinError, match=r"rows\.jsonl: the rows are not those that .* began with; .* held-out rows"):
        made(copy, tmp_path / "out", "merged-16bit")


def test_only_a_merge_needs_the_rows(run: RunDir, tmp_path: Path) -> None:
    copy = RunDir(Path(shutil.copytree(run.path, tmp_path / "run")))
    record = read_json(copy.record)
    gone = tmp_path / "gone.jsonl"
    record["config"]["data"]["source"] = str(gone)
    write_json(copy.record, record)
    copy.config.write_text(copy.config.read_text().replace(load_config(run.config).data.source or "", str(gone)))
    assert call("export", copy.path, "--to", "adapter", "--iteration", "0", "--out", tmp_path / "out").code == 0
    answer = call("export", copy.path, "--to", "gguf", "--iteration", "0", "--out", tmp_path / "gguf")
    assert (answer.code, answer.out) == (1, "")
    assert answer.err == (
        f"error: {gone}: no such file; check the path. A merge is compared with the trained model on the run's "
        "held-out rows; an adapter needs none\n"
    )
    assert not (tmp_path / "gguf").exists()


# --- the command ---


def test_one_that_is_stopped_leaves_nothing(run: RunDir, tmp_path: Path) -> None:
    command = process("export", run.path, "--to", "merged-16bit", "--out", tmp_path / "out" / "model")
    assert command.stdout is not None
    assert "the trained model on" in command.stdout.readline()
    command.send_signal(signal.SIGINT)
    _, err = command.communicate(timeout=60)
    assert err == "stopped; nothing was written, and the same command begins anew\n"
    assert command.returncode == 130
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_the_command_says_what_came_out(run: RunDir, tmp_path: Path) -> None:
    answer = call("export", run.path, "--to", "merged-16bit", "--onto", "dequantised", "--out", tmp_path / "out")
    assert (answer.code, answer.err) == (0, "")
    lines = answer.out.splitlines()
    assert lines[0] == "tiny-qwen2, iteration 1: the trained model on 8 held-out rows"
    assert lines[-2].startswith("8 held-out rows: NLL ")
    assert lines[-1] == f"exported: {tmp_path / 'out'}"


def test_by_default_it_is_written_beside_the_run(run: RunDir, tmp_path: Path) -> None:
    shutil.copytree(run.path, tmp_path / "run")
    assert call("export", tmp_path / "run", "--to", "adapter", "--iteration", "0").code == 0
    assert (tmp_path / "run-iteration-0-adapter" / "adapter_config.json").is_file()


def test_a_big_drift_is_a_loud_warning(run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "MOST_ELSEWHERE", -0.01)
    answer = call("export", run.path, "--to", "merged-16bit", "--out", tmp_path / "out")
    assert answer.code == 0
    assert answer.err.startswith("WARNING: the exported model is another than the trained one")


def test_the_runs_own_rounding_is_told_and_is_no_drift(
    tiny_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_run(tiny_folder("qwen2"), tmp_path, "model.dtype=bfloat16")
    monkeypatch.setattr(compare, "MOST_NLL", -1.0)
    told = "; these are the trained weights, and the run's bfloat16 rounding is what differs"
    exact = [("merged-16bit", "dequantised", "float32"), ("gguf", "dequantised", "f32")]
    others = [("merged-16bit", "original", "float32"), ("gguf", "dequantised", "bf16")]
    for number, (to, onto, dtype) in enumerate([*exact, *others]):
        answer = call("export", run, "--to", to, "--onto", onto, "--out", tmp_path / str(number), "--dtype", dtype)
        assert answer.code == 0
        own = number < len(exact)
        assert (answer.err == "") is own
        assert answer.out.splitlines()[-2].endswith("of the places" + (told if own else ""))
        assert read_json(tmp_path / str(number) / CHECK)["trained_in"] == "bfloat16"
