"""Where a run stands, in lines for people: of a live panel, of a log, of `qspin status`. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.text import Text

from qspin.holder import LETS_ON
from qspin.run_dir import RunDir
from qspin.safe_text import breaks_shown, visible
from qspin.units import GIB
from qspin.watch.meter import Status
from qspin.watch.status import Standing

FIGURES = {  # how a figure is shown, in this order; others come after them by their own names
    "loss": "loss {:.3f}",
    "margin": "margin {:+.3f}",
    "real_reward": "real reward {:+.3f}",
    "generated_reward": "generated reward {:+.3f}",
    "accuracy": "accuracy {:.0%}",
    "nll": "NLL {:.3f}",
    "ended": "ended {:.0%}",
    "two_sample_auc": "2-sample AUC {:.2f}",
    "reward_auc": "reward AUC {:.2f}",
    "f1": "F1 {:.2f}",
    "style": "style {:.0%}",
    "tokens": "{:.0f} tokens",
    "tokens/s": "{:.0f} tokens/s",
}
NOT_SHOWN = {  # for programs and trackers
    "step", "epoch", "lr", "grad_norm", "length_auc", "greedy_tokens", "greedy_ended", "distinct_1", "distinct_2",
    "gap", "kl", "real_nll",
}  # fmt: skip
NARROWEST_BAR = 10


def panel(status: Status, width: int, *, running: bool = True) -> list[Text]:
    """Lines of at most `width` cells: where a run stands, how fast it is, what it last found and sampled."""
    share = min(1.0, status.done / status.total)
    head = Text(title(status), style="bold")
    count = Text(f"{int(status.done)}/{status.total} {status.unit}  {int(100 * share)}%")
    room = width - head.cell_len - count.cell_len - 4
    if room >= NARROWEST_BAR:
        done = int(room * share)
        bar = Text.assemble(("━" * done, "green"), ("─" * (room - done), "dim"))
        lines = [Text("  ").join([head, bar, count])]
    else:
        lines = _flow([head, count], width, indent=0)
    if running:
        times = f"phase {span(status.phase_seconds_left)} left", f"run {span(status.run_seconds_left)} left"
        parts = [Text(part, style="cyan") for part in (*_rate(status), *times)]
        lines += _flow([*parts, Text(_memory(status), style="magenta")], width)
    lines += _flow([Text(figure, style="green") for figure in _figures(status.figures)], width)
    if status.prompt is not None and status.completion is not None:
        completion = Text(breaks_shown(status.completion[: 4 * width]))
        first, *more = completion.wrap(Console(), max(1, width - 14))
        sample = {"prompt": breaks_shown(status.prompt[: 4 * width]), "completion": first.plain}
        if more:  # on a second line, which is cut
            sample[""] = "".join(line.plain for line in more)
        lines += [Text.assemble(f"  {label:<12}", (text, "italic")) for label, text in sample.items()]
    for line in lines:
        line.truncate(width, overflow="ellipsis")
        line.no_wrap = True
    return lines


def ended_lines(status: Status, width: int) -> list[Text]:
    """A phase that is over, for good or because it has to be done again."""
    did = f"{status.total} {status.unit}" if status.complete else f"{int(status.done)}/{status.total} {status.unit}"
    parts = [f"{did} in {span(status.phase_seconds)}", *_rate(status), *_figures(status.figures)]
    return _flow([Text(title(status)), *(Text(part, style="dim") for part in parts)], width, indent=0, gap=2)


def plain_line(status: Status) -> str:
    parts = [
        f"{title(status)}: {int(status.done)}/{status.total} {status.unit}",
        *_rate(status),
        f"{span(status.phase_seconds_left)} left",
        f"run {span(status.run_seconds_left)} left",
        _memory(status),
        *_figures(status.figures),
    ]
    return "  ".join(parts)


def standing_lines(standing: Standing, run_dir: RunDir, width: int) -> list[Text]:
    """What `qspin status` shows."""
    status = standing.status
    where = f"{run_dir.path}: {standing.state}"
    match standing.state:
        case "not started":
            lines = [f"{where}; nothing has been done here yet"]
        case "starting":
            lines = [f"{where} ({standing.process}); it has begun no phase yet"]
        case "running" | "paused":
            who = "its baseline is " if status is not None and status.baseline else ""
            ago = f", as of {span(standing.age)} ago" if status is not None else ""
            how = f"; {LETS_ON}" if standing.state == "paused" else ""
            lines = [f"{run_dir.path}: {who}{standing.state} ({standing.process}){ago}{how}"]
        case "stopped":
            ago = f" {span(standing.age)} ago" if status is not None else ""
            lines = [f"{where}{ago}; the command that started it goes on from the last finished piece"]
        case "finished":
            done = standing.iterations_done
            lines = [
                f"{where}, {done} iteration{'s' * (done != 1)}",
                f"adapter: {run_dir.iteration(standing.kept or 0).adapter}",
                *([f"table: {run_dir.summary}"] if run_dir.summary.is_file() else []),
            ]
    shown = [Text(visible(line)) for line in lines]
    if status is not None:
        shown += panel(status, width, running=standing.state == "running")
    if standing.baseline is not None:
        left, age = standing.baseline
        shown.append(Text(f"baseline, {span(age)} ago: {title(left)}, {int(left.done)}/{left.total} {left.unit}"))
    return shown


def title(status: Status) -> str:
    """Which iteration by its number, which is from 0 as everywhere, and how many that makes."""
    number, kind = status.iteration, "supervised round" if status.baseline else "iteration"
    before = "warm start" if status.warm_start else "base"
    where = before if number is None else f"{kind} {number} ({number + 1} of {status.iterations})"
    return where if status.phase == where else f"{where} · {status.phase}"


def span(seconds: float | None) -> str:
    """A stretch of time to two places or more, "?" if it is not known."""
    if seconds is None:
        return "?"
    if (whole := round(seconds)) < 100:
        return f"{whole} s"
    if whole < 600:
        return f"{whole // 60} min {whole % 60:02} s"
    if (minutes := round(seconds / 60)) < 100:
        return f"{minutes} min"
    if (hours := minutes // 60) < 48:
        return f"{hours} h {minutes % 60:02} min"
    return f"{hours // 24} d {hours % 24} h"


def _rate(status: Status) -> list[str]:
    return [f"{_short(status.rate)} {status.unit}/s"] if status.rate is not None else []


def _memory(status: Status) -> str:
    return f"memory {status.memory_used / GIB:.1f} of {status.memory_total / GIB:.1f} GiB"


def _figures(figures: Mapping[str, float]) -> list[str]:
    known = [form.format(figures[name]) for name, form in FIGURES.items() if name in figures]
    others = [name for name in figures if name not in FIGURES and name not in NOT_SHOWN]
    return known + [f"{name.replace('_', ' ')} {_short(figures[name])}" for name in others]


def _flow(parts: Sequence[Text], width: int, *, indent: int = 2, gap: int = 3) -> list[Text]:
    """Parts side by side, on as many lines as they take; none is torn apart. `indent` is the first line's."""
    lines: list[Text] = []
    for part in parts:
        if lines and lines[-1].cell_len + gap + part.cell_len <= width:
            lines[-1].append(" " * gap).append_text(part)
        else:
            lines.append(Text(" " * (2 if lines else indent)).append_text(part))
    return lines


def _short(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
