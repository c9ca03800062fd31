"""A finished run as one HTML file that asks nothing of any network: report.html.

    text = page(run_dir, config, prepared.heldout_prompts)

What comes from data is text and nothing else: escaped by the template, put into the page by `textContent`, and under a
policy that runs no script but the page's own.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import jinja2
from markupsafe import Markup

from qspin.config import RunConfig, dump_config
from qspin.errors import QspinError
from qspin.figures import plots
from qspin.figures.evaluation import panel, real_panel
from qspin.figures.players import Player, kept, players
from qspin.figures.report import BENCHMARKS, HELD, MAIN, PHASES, measured_on, played, sentences, tables
from qspin.run_dir import RunDir
from qspin.safe_text import visible
from qspin.units import GIB

SHOWN_ROWS = 200  # held-out rows to page through, at most

SCRIPT = """
const rows = JSON.parse(document.getElementById("rows").textContent);
const place = document.getElementById("place"), row = document.getElementById("row");
let at = 0;
function part(name, text) {
  const who = document.createElement("div"), box = document.createElement("div");
  who.className = "who"; who.textContent = name; box.className = "text"; box.textContent = text;
  row.append(who, box);
}
function show() {
  row.replaceChildren();
  for (const [name, text] of rows[at]) part(name, text);
  place.textContent = (at + 1) + " of " + rows.length;
}
document.getElementById("back").onclick = () => { at = (at + rows.length - 1) % rows.length; show(); };
document.getElementById("on").onclick = () => { at = (at + 1) % rows.length; show(); };
show();
"""


def page(run_dir: RunDir, config: RunConfig, prompts: Sequence[str] | None) -> str:
    """report.html.

    Args:
        prompts: of the held-out rows; None where the data is not to be had, and then the page says so.

    Raises:
        QspinError: nobody was measured yet.
    """
    record = run_dir.read_record()
    measured = players(run_dir, config)
    if not measured:
        raise QspinError(f"{run_dir.path}: nobody has been measured yet; the command that began the run goes on")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("qspin.figures", "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    data, shown = record["data"], tables(run_dir, config)
    return environment.get_template("report.html.j2").render(
        title=f"{visible(record['base']['name'])} after self-play",
        about=f"{data['train_rows']} training rows, {data['heldout_rows']} held out, {played(measured, config)}.",
        said=[visible(sentence) for sentence in sentences(run_dir, config)],
        measured_on=measured_on(run_dir, config),
        tables=shown,
        main=MAIN + (shown[MAIN].title == BENCHMARKS),
        pictures=_pictures(measured, config),
        held=HELD,
        lineage=_lineage(record),
        settings=visible(dump_config(config)),
        rows=_rows(measured, prompts),
        without_prompts=prompts is None,
        script=Markup(SCRIPT),
        script_hash=base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode(),
    )


def _pictures(measured: Sequence[Player], config: RunConfig) -> dict[str, Markup]:
    seed = config.seed
    panels = {player.name: panel(player.evaluation, "report", seed=seed) for player in measured}
    real = real_panel(measured[0].evaluation, "report", seed=seed)
    found = {
        "players": plots.players(
            panels,
            {
                "nll": ("NLL, nats a token", None),
                "two_sample_auc": ("2-sample AUC", 0.5),
                "f1": ("token F1", None),
                "tokens": ("tokens", real["tokens"].value),
                "ended": ("share that end", real["ended"].value),
                "reward_auc": ("reward AUC", None),
            },
        ),
        "lengths": plots.distributions(_lengths(measured, config), "Lengths of held-out completions", "tokens"),
        "times": plots.shares({who.told: _seconds(who) for who in measured}, PHASES, "Where the time went", "seconds"),
    }
    memory = {who.told: _gib(who) for who in measured}
    if any(memory.values()):
        found["memory"] = plots.groups(memory, PHASES, "The most memory held while each phase worked", "GiB")
    margins = {f"iteration {player.name}": _margins(player) for player in measured if player.name.isdigit()}
    if any(margins.values()):
        found["margins"] = plots.lines({k: v for k, v in margins.items() if v}, "Margin while training", "step")
    return {"margins": Markup(""), "memory": Markup(""), **{name: Markup(svg) for name, svg in found.items()}}


def _lengths(measured: Sequence[Player], config: RunConfig) -> dict[str, list[int]]:
    first, last = measured[0], kept(measured, config) or measured[-1]
    own = {player.told: [len(ids) for ids in player.evaluation.generated_ids] for player in (first, last)}
    return {"real": first.evaluation.real_tokens, **own}


def _seconds(player: Player) -> dict[str, float]:
    found = player.folder.seconds()
    return {phase: found[phase] for phase in PHASES if phase in found}


def _gib(player: Player) -> dict[str, float]:
    found = player.folder.peaks()
    return {phase: found[phase] / GIB for phase in PHASES if phase in found}


def _margins(player: Player) -> list[float]:
    return [step["margin"] for step in player.folder.steps()]


def _lineage(record: dict[str, Any]) -> list[tuple[str, str]]:
    """Where it comes from, name by name."""
    base, data = record["base"], record["data"]
    told = {
        "base": base["name"],
        "revision": base["revision"] or "not pinned",
        "rows' fingerprint": data["fingerprint"],
        "format": data["format"],
        "rows left out": data["rejected_rows"],
        "qspin": record["qspin"],
        "kernels": record["backend"],
        **record["versions"],
    }
    return [(name, visible(str(value))) for name, value in told.items()]


def _rows(measured: Sequence[Player], prompts: Sequence[str] | None) -> Markup:
    """Prompt, real completion and each player's, as JSON that ends no script element."""
    rows = [
        [
            *([] if prompts is None else [("prompt", visible(prompts[index]))]),
            ("real", visible(real)),
            *((player.told, visible(player.evaluation.completions[index])) for player in measured),
        ]
        for index, real in enumerate(measured[0].evaluation.real_completions[:SHOWN_ROWS])
    ]
    return Markup(json.dumps(rows).replace("<", "\\u003c"))
