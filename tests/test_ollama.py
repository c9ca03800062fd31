"""The Modelfile, read as Ollama reads it: its Go template must write what the chat template writes."""

from __future__ import annotations

import datetime
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from chat_templates import GEMMA, LLAMA_DATE, MISTRAL, NO_THINKING, QWEN3, build, families, smollm2, trl_templates
from conftest import ROOT

from qspin.chat import Renderer
from qspin.errors import QspinError
from qspin.exports.ollama import go_template, modelfile
from qspin.records import Message

SYSTEM = Message("system", "Be {{ brief }}.")
TALK = [
    Message("user", 'What is "2 + 2"?'),
    Message("assistant", "4."),
    Message("user", "And\ntwice that?"),
    Message("assistant", "8."),
    Message("user", "Thanks, }} why?"),
]
CONVERSATIONS = [[*system, *TALK[:turns]] for system in ([], [SYSTEM]) for turns in (1, 3, 5)]

Node = tuple[str, Any]


def actions(template: str) -> Iterator[str]:
    """What stands between the braces; nothing may stand between the actions."""
    at = 0
    while at < len(template):
        assert template.startswith("{{ ", at)
        at += 3
        if template[at] == '"':
            _, end = json.JSONDecoder().raw_decode(template, at)
        else:
            end = template.index(" }}", at)
        yield template[at:end]
        assert template.startswith(" }}", end)
        at = end + 3


def tree(found: Iterator[str]) -> tuple[list[Node], str]:
    """The actions up to an `else` or `end`, and which of them it was."""
    nodes: list[Node] = []
    for action in found:
        word, _, rest = action.partition(" ")
        if word in {"end", "else"}:
            return nodes, action
        if word == "if":
            nodes.append(("if", branches(rest, found)))
        elif word == "range":
            assert rest == "$index, $message := .Messages"
            body, closing = tree(found)
            assert closing == "end"
            nodes.append(("range", body))
        else:
            nodes.append(("write", action))
    return nodes, ""


def branches(condition: str, found: Iterator[str]) -> list[tuple[str, list[Node]]]:
    body, closing = tree(found)
    if closing == "end":
        return [(condition, body)]
    if closing == "else":
        other, closing = tree(found)
        assert closing == "end"
        return [(condition, body), ("true", other)]
    return [(condition, body), *branches(closing.removeprefix("else if "), found)]


def execute(nodes: Sequence[Node], messages: Sequence[Message], index: int | None = None) -> str:
    """Go's text/template, as far as it is used. `index` is the message that the dot stands for."""
    system = "\n\n".join(message.content for message in messages if message.role == "system")
    text = ""
    for kind, node in nodes:
        if kind == "range":
            text += "".join(execute(node, messages, i) for i in range(len(messages)))
        elif kind == "if":
            for condition, body in node:
                holds = {
                    "true": True,
                    ".System": bool(system),
                    "and $.System (eq (len (slice $.Messages $index)) 1)": bool(system)
                    and index is not None
                    and len(messages[index:]) == 1,
                }
                role = re.fullmatch(r'eq \.Role "(\w+)"', condition)
                if messages[index or 0].role == role[1] if role else holds[condition]:
                    text += execute(body, messages, index)
                    break
        elif node.startswith('"'):
            text += json.loads(node)
        elif node in {".System", "$.System"}:
            assert (index is None) == (node == ".System")
            text += system
        else:
            assert node == ".Content" and index is not None
            text += messages[index].content
    return text


def said(template: str, messages: Sequence[Message]) -> str:
    nodes, closing = tree(actions(template))
    assert closing == ""
    return execute(nodes, messages)


OWN = {path.stem: path.read_text() for path in (ROOT / "presets" / "templates").glob("*.jinja")}
KNOWN = {"gemma": GEMMA, "llama-date": LLAMA_DATE, "mistral": MISTRAL, "qwen3": QWEN3, "smollm2": None, **OWN}


def renderer_of(name: str) -> Renderer:
    if name == "smollm2":
        return build(smollm2())
    return build(families(), template=KNOWN[name], template_kwargs=NO_THINKING if name == "qwen3" else {})


@pytest.mark.parametrize("name", KNOWN)
def test_the_go_template_writes_what_the_chat_template_writes(name: str) -> None:
    renderer = renderer_of(name)
    template = go_template(renderer.prompt_text)
    for conversation in CONVERSATIONS:
        assert said(template, conversation) == renderer.prompt_text(conversation)


GO = """
package main

import ("encoding/json"; "os"; "strings"; "text/template")

type Message struct { Role, Content string }
type Values struct { System string; Messages []Message }
type Order struct { Template string; Values Values }

func main() {
	var orders []Order
	if err := json.NewDecoder(os.Stdin).Decode(&orders); err != nil { panic(err) }
	said := []string{}
	for _, order := range orders {
		var text strings.Builder
		made := template.Must(template.New("").Option("missingkey=zero").Parse(order.Template))
		if err := made.Execute(&text, order.Values); err != nil { panic(err) }
		said = append(said, text.String())
	}
	json.NewEncoder(os.Stdout).Encode(said)
}
"""


@pytest.mark.skipif(shutil.which("go") is None, reason="Go is not installed")
def test_gos_own_templates_read_it_so(tmp_path: Path) -> None:
    """With the values that Ollama gives: the system text apart, and all messages."""
    (tmp_path / "main.go").write_text(GO)
    orders, expected = [], []
    for name in KNOWN:
        renderer = renderer_of(name)
        template = go_template(renderer.prompt_text)
        for conversation in CONVERSATIONS:
            messages = [{"Role": message.role, "Content": message.content} for message in conversation]
            system = "".join(message.content for message in conversation if message.role == "system")
            orders.append({"Template": template, "Values": {"System": system, "Messages": messages}})
            expected.append(renderer.prompt_text(conversation))
    environment = {**os.environ, "GOFLAGS": "-mod=mod", "GOTOOLCHAIN": "local", "GOCACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        ["go", "run", "main.go"], input=json.dumps(orders), cwd=tmp_path, env=environment, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == expected
    assert len(expected) >= 6 * 5


def test_a_real_family_is_said_or_refused_and_never_said_wrong() -> None:
    """The templates of TRL's wheel; most can be said."""
    outcomes = {}
    for path in trl_templates():
        try:
            renderer = build(families(), template=path.read_text(encoding="utf-8"))
            [renderer.prompt_text(conversation) for conversation in CONVERSATIONS]
        except QspinError:
            continue  # not one that qspin can train with
        try:
            template = go_template(renderer.prompt_text)
        except QspinError as error:
            assert "Ollama's template language can't be made to say" in str(error)
            outcomes[path.stem] = False
            continue
        outcomes[path.stem] = True
        for conversation in CONVERSATIONS:
            assert said(template, conversation) == renderer.prompt_text(conversation), path.stem
    assert sum(outcomes.values()) >= 0.7 * len(outcomes) > 5, outcomes


def test_a_template_that_counts_its_turns_is_refused() -> None:
    counted = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + (loop.index | string) + '\n' + m['content']"
        " + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant' +"
        " ((messages | length + 1) | string) + '\n' }}{% endif %}"
    )
    renderer = build(smollm2(), template=counted)
    with pytest.raises(QspinError, match=r"^chat\.template: Ollama's template language can't be made to say"):
        go_template(renderer.prompt_text)


def parse(text: str) -> dict[str, Any]:
    """A Modelfile's instructions, one way or the other of quoting each."""
    found: dict[str, Any] = {"stop": []}
    rest = text
    while rest:
        if multi := re.match(r'TEMPLATE """([\s\S]*?)"""\n', rest):
            found["TEMPLATE"] = multi[1]
        elif multi := re.match(r"FROM (\S+)\n", rest):
            found["FROM"] = multi[1]
        elif multi := re.match(r'PARAMETER stop "([^"\n]+)"\n', rest):
            found["stop"].append(multi[1])
        else:
            raise AssertionError(f"no instruction: {rest[:80]!r}")
        rest = rest[multi.end() :]
    return found


def test_a_modelfile_is_parsed_to_what_was_meant() -> None:
    renderer = build(smollm2())
    text = modelfile("SmolLM2-f16.gguf", renderer.prompt_text, ["<|im_end|>", "<|endoftext|>"])
    found = parse(text)
    assert found["FROM"] == "./SmolLM2-f16.gguf"
    assert found["stop"] == ["<|im_end|>", "<|endoftext|>"]
    assert said(found["TEMPLATE"], [Message("user", "Why?")]) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_quotes_in_a_chat_template_do_not_end_the_modelfiles() -> None:
    quoted = (
        '{% for m in messages %}{{ \'"""\' + m["role"] + \'\\\\"\\t\' + m["content"] + "<|im_end|>" }}{% endfor %}'
        '{% if add_generation_prompt %}{{ \'"""assistant\\\\"\\t\' }}{% endif %}'
    )
    renderer = build(smollm2(), template=quoted, date=datetime.date(2026, 1, 1))
    found = parse(modelfile("a.gguf", renderer.prompt_text, []))
    assert said(found["TEMPLATE"], TALK[:1]) == renderer.prompt_text(TALK[:1])
    assert renderer.prompt_text(TALK[:1]).startswith('"""user\\"\t')
