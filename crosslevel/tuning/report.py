"""The output of a search: the best settings, the table of trials, and a page."""

from __future__ import annotations

import copy
import csv
import io
import shlex
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from crosslevel import report
from crosslevel.data.uri import Source
from crosslevel.report import Block, Cell, cell
from crosslevel.settings import describe as trees
from crosslevel.tuning import finals
from crosslevel.tuning import search_space as ranges
from crosslevel.tuning.plan import Plan
from crosslevel.tuning.trials import cost, outcome, spent
from crosslevel.utils.errors import UserError
from crosslevel.utils.files import BAD_FILES, CONFIG, REPORT, write
from crosslevel.utils.trees import yaml_tree

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial


BEST, TABLE, PAGE = CONFIG, "trials.csv", REPORT
FIGURES = {"top1": "retrieval", "mrr": "MRR", "nmi": "NMI", "ami": "AMI", "effective_rank": "rank"}
NOTE = (
    "The combined score is how surely an image's other view is found among all held-out images (mean reciprocal rank), "
    "times a root of the share of directions in which the features differ (effective rank). No label was read."
)


def leave(study: Study, plan: Plan, source: Source, settings: dict[str, Any], console: Console) -> None:
    """Write the best settings, the table of trials and the page; print the table.

    Raises:
        ValueError: trials have ended, but none was successful.

    """
    _report_unread(plan, console)
    trials = ended(study)
    if not trials:
        return
    _write_table(trials, plan)
    best = finals.best(trials, plan)
    if best is not None:
        tree = best_settings(settings, {name: best.params[name] for name in plan.space if name in best.params})
        trees.write({**tree, "images": source.absolute().text}, plan.folder / BEST)
    console.print(_printed(trials, plan))
    page = report.page(
        plan.folder / PAGE,
        f"Search {plan.folder.name}",
        blocks(trials, plan, best),
        f"{source.text} · {summary(study, plan)} · {time.strftime('%Y-%m-%d')}",
        verdict(trials, plan, best) if best is not None else "No trial came to its end.",
    )
    if best is None:
        kinds = ", ".join(f"{n} {kind}" for kind, n in _counts(trials).items())
        last = trials[-1].user_attrs.get("reason", "")
        raise UserError(f"no trial came to its end ({kinds}), the last one: {last}; {plan.folder / TABLE} has all")
    for line in (f"{verdict(trials, plan, best)} {page} shows more; next:", f"  {following(plan)}"):
        console.print(line, highlight=False, markup=False)


def _report_unread(plan: Plan, console: Console) -> None:
    """Print once the files that this machine's trials could not read, in training or among the held-out images."""
    before = len(plan.bad_files)
    for file in sorted((plan.folder / "trials").glob(f"*/*{BAD_FILES}")):
        plan.bad_files.read(file)
    if not len(plan.bad_files):
        return
    plan.bad_files.write(plan.folder / BAD_FILES)
    if len(plan.bad_files) > before:
        console.print(plan.bad_files.summary(plan.images), highlight=False, markup=False)


def ended(study: Study) -> list[FrozenTrial]:
    """All trials that have ended."""
    return [trial for trial in study.get_trials(deepcopy=False) if trial.state.is_finished()]


def best_settings(settings: Mapping[str, Any], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The tree of settings with a trial's parameters inserted."""
    tree: dict[str, Any] = copy.deepcopy(dict(settings))
    for name, value in parameters.items():
        part, _, last = name.rpartition(".")
        branch = tree if not part else tree[part].setdefault("init_args", {}) if part == "method" else tree[part]
        branch[last] = ranges.written(value) if isinstance(value, str) else value
    return tree


def following(plan: Plan) -> str:
    """Commands to continue with the best settings."""
    return f"crosslevel train --config {shlex.quote(str(plan.folder / BEST))}"


def summary(study: Study, plan: Plan) -> str:
    """The progress of the search."""
    trials = ended(study)
    used = spent(trials, plan.epochs)
    kinds = ", ".join(f"{n} {kind}" for kind, n in _counts(trials).items()) or "none yet"
    limits = [f"{plan.budget:g} full trainings"] if plan.budget < float("inf") else []
    limits += [f"{plan.trials} trials"] if plan.trials is not None else []
    return f"{used:.1f} full trainings of at most {' and '.join(limits)}; trials: {kinds}"


def line(trial: FrozenTrial, plan: Plan) -> str:
    """A trial that has ended, in one line."""
    score = _score(trial)
    score_text = "" if score is None else f"  score {score:.4f}"
    values = ", ".join(f"{name}={_value(value)}" for name, value in trial.params.items())
    reason = trial.user_attrs.get("reason", "")
    epochs = f"{trial.last_step or 0}/{plan.epochs} epochs"
    return f"trial {trial.number}  {outcome(trial)}  {epochs}{score_text}  {values}{f'  ({reason})' if reason else ''}"


def verdict(trials: Sequence[FrozenTrial], plan: Plan, best: FrozenTrial) -> str:
    """Describe the gain of the best trial in a sentence."""
    default, score = finals.as_given(trials, plan), finals.score(trials, best)
    of_two = ", the mean of two trainings" if any(_is_complete(t) for t in finals.repeated(trials, best)) else ""
    sentence = f"Trial {best.number} scored best: {score:.4f}{of_two}"
    if default is None:
        return f"{sentence}."
    if best.number == default.number:
        return f"The settings as given scored best: {score:.4f}{of_two}."
    return f"{sentence}; the settings as given, trial {default.number}: {finals.score(trials, default):.4f}."


def blocks(trials: Sequence[FrozenTrial], plan: Plan, best: FrozenTrial | None) -> list[Block]:
    """The page's sections."""
    out = [report.text("What was searched", NOTE)]
    if best is not None:
        out.append(_settings_table(trials, plan, best))
        out.append(report.commands("Next", [following(plan)]))
    scored = [trial for trial in trials if _score(trial) is not None]
    if scored:
        out.append(_history(scored))
        out.append(_epochs(scored))
    out += _importance(scored, plan)
    if len(scored) > 1:
        points = [({**t.params}, float(_score(t) or 0.0), _is_complete(t)) for t in scored]
        out.append(report.parallel("Parallel coordinates", _axes(plan), points, "score", PARALLEL))
    out.append(_all_trials(trials, plan))
    if best is not None:
        out.append(report.settings("Best settings", (plan.folder / BEST).read_text(encoding="utf-8")))
    return out


PARALLEL = (
    "A line a trial, from its settings to its score; the darker, the higher. Trials that were stopped are dashed."
)


def _axes(plan: Plan) -> dict[str, report.Axis]:
    return {
        name: report.Axis(searched.low, searched.high, searched.log)
        if isinstance(searched, ranges.Numbers)
        else report.Axis(choices=searched)
        for name, searched in plan.space.items()
    }


def _settings_table(trials: Sequence[FrozenTrial], plan: Plan, best: FrozenTrial) -> Block:
    defaults = plan.start[0] if plan.as_given and plan.start else {}
    rows: list[list[Cell]] = [
        [name, ranges.range_text(searched), _value(defaults.get(name)), _value(best.params[name])]
        for name, searched in plan.space.items()
    ]
    return report.table("Best settings found", ["setting", "searched", "as given", "best"], rows, None)


def _history(scored: Sequence[FrozenTrial]) -> Block:
    points = [(trial.number, float(_score(trial) or 0.0), _is_complete(trial)) for trial in scored]
    note = "Filled: trained to the end. Hollow: stopped before, with its last score."
    return report.history("History", points, "trial", "score", note)


def _epochs(scored: Sequence[FrozenTrial], limit: int = 8) -> Block:
    best = sorted(scored, key=lambda t: (_is_complete(t), _score(t)), reverse=True)[:limit]
    series = {f"trial {t.number}": sorted(t.intermediate_values.items()) for t in best}
    return report.curves("Score during training", series, "epoch", "score", f"The best {len(best)} trials.")


def _importance(scored: Sequence[FrozenTrial], plan: Plan) -> list[Block]:
    """The share of the score's variance that each parameter explains, at the most informative epoch.

    That is the last epoch that at least half of all trials, and at least 4, have reached: later epochs only include
    trials that were good before.
    """
    reached = Counter(epoch for trial in scored for epoch in trial.intermediate_values)
    enough = [epoch for epoch, count in reached.items() if count >= max(4, len(scored) / 2)]
    if not enough or len(plan.space) < 2:
        return []
    epoch = max(enough)
    values = [(t, t.intermediate_values[epoch]) for t in scored if epoch in t.intermediate_values]
    shares = importance(values)
    if not shares:
        return []
    note = (
        f"Share of the differences in score after epoch {epoch} that each setting explains, over the {len(values)} "
        "trials that came so far (functional ANOVA). With few trials it is rough."
    )
    return [report.bars("Importance, %", list(shares), [100 * share for share in shares.values()], note)]


def importance(values: Sequence[tuple[FrozenTrial, float]]) -> dict[str, float]:
    """Shares by parameter, the largest first; empty if all scores are equal."""
    import optuna  # noqa: PLC0415
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances  # noqa: PLC0415

    if len({value for _, value in values}) < 2:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study = optuna.create_study(direction="maximize")
        for trial, value in values:
            study.add_trial(optuna.create_trial(params=trial.params, distributions=trial.distributions, value=value))
        shares: dict[str, float] = get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0))
    return shares


def _all_trials(trials: Sequence[FrozenTrial], plan: Plan) -> Block:
    columns = ["trial", "outcome", "epochs", "score", *FIGURES.values(), *plan.space, "reason"]
    rows: list[list[Cell]] = [_row(trial, plan) for trial in trials]
    marks = [None, None, None, "max", *[None] * (len(columns) - 4)]
    return report.table("All trials", columns, rows, marks, digits=4)  # type: ignore[arg-type]


def _row(trial: FrozenTrial, plan: Plan) -> list[Cell]:
    figures = trial.user_attrs.get("figures", {})
    return [
        trial.number,
        outcome(trial),
        trial.last_step or 0,
        _score(trial),
        *(figures.get(name) for name in FIGURES),
        *(_value(trial.params.get(name)) for name in plan.space),
        trial.user_attrs.get("reason", ""),
    ]


def _printed(trials: Sequence[FrozenTrial], plan: Plan, limit: int = 10) -> Table:
    """Print the best trials; the file has all."""
    selected = sorted(trials, key=lambda t: (_is_complete(t), _score(t) or 0.0), reverse=True)[:limit]
    table = Table(title=f"The best {len(selected)} of {len(trials)} trials" if len(trials) > limit else "Trials")
    for column in ("trial", "outcome", "epochs", "score"):
        table.add_column(column, justify="left" if column == "outcome" else "right", no_wrap=True)
    table.add_column("settings", overflow="fold")
    for trial in selected:
        number, kind, epochs, score, *cells = _row(trial, plan)
        values = cells[len(FIGURES) : len(FIGURES) + len(plan.space)]
        values_text = ", ".join(f"{name} {cell(value, 4)}" for name, value in zip(plan.space, values, strict=True))
        table.add_row(*(cell(value, 4) for value in (number, kind, epochs, score)), values_text)
    return table


def _write_table(trials: Sequence[FrozenTrial], plan: Plan) -> None:
    names = sorted({name for trial in trials for name in trial.user_attrs.get("figures", {})})
    names = ["combined", *(name for name in names if name != "combined")]
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerow(["trial", "outcome", "repeats", "epochs", "cost", "seconds", *plan.space, *names, "reason"])
    for trial in trials:
        attributes = trial.user_attrs
        writer.writerow(
            [
                trial.number, outcome(trial), attributes.get(finals.REPEATS, ""), trial.last_step or 0,
                f"{cost(trial, plan.epochs):.4g}", attributes.get("seconds", ""),
                *(trial.params.get(name, "") for name in plan.space),
                *(attributes.get("figures", {}).get(name, "") for name in names), attributes.get("reason", ""),
            ]
        )  # fmt: skip
    write(plan.folder / TABLE, table.getvalue())


def _is_complete(trial: FrozenTrial) -> bool:
    """Whether the trial was completed; a stopped trial also has a value, its last score."""
    return trial.state.name == "COMPLETE"


def _score(trial: FrozenTrial) -> float | None:
    """The last score."""
    return trial.intermediate_values[trial.last_step] if trial.last_step is not None else None


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "–" if value is None else str(value)


def _counts(trials: Sequence[FrozenTrial]) -> dict[str, int]:
    return dict(Counter(outcome(trial) for trial in trials))


def read_best(folder: Path) -> dict[str, Any]:
    """Read the best settings of a search."""
    tree: dict[str, Any] = yaml_tree((folder / BEST).read_text(encoding="utf-8"))
    return tree
