"""The comparison as one HTML page: table, bars, every metric, and a browser of disagreements. It loads nothing else.

What models or benchmarks wrote reaches the page as text (escaped, or through `textContent`), never as markup.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from itertools import combinations
from typing import Any

from eval.example import Example
from eval.report.comparison import ScoredRun, difference, footnotes, headlines, incomparable, references
from eval.task import Headline
from llavamod_offline.errors import DataError, EvalError
from llavamod_offline.pages.charts import BarPanel, bar_panels, colour, colour_key
from llavamod_offline.pages.page import html_page, json_block, thumbnail

STYLE = """
th, td { white-space: nowrap; } tr.published { color: var(--soft); }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(300px, 100%), 1fr)); gap: 1rem; }
.cards .card { overflow-wrap: anywhere; margin-top: 0; }
.cards img { max-width: 100%; max-height: 220px; display: block; margin: 0 auto .5rem; border-radius: .4rem; }
.cards pre { white-space: pre-wrap; font: inherit; margin: .25rem 0; }
"""

SCRIPT = """
const data=JSON.parse(document.getElementById('samples').textContent);
const pick=id=>document.getElementById(id);
const make=(tag,text,name)=>{const e=document.createElement(tag);if(text!==undefined)e.textContent=text;
if(name)e.className=name;return e};
const option=(select,text,value)=>{const o=make('option',text);o.value=value;select.append(o)};
data.tasks.forEach((t,i)=>option(pick('task'),t.task,i));
data.runs.forEach((r,i)=>{option(pick('a'),r,i);option(pick('b'),r,i)});
pick('b').value=1;
function show(){const a=+pick('a').value,b=+pick('b').value,task=data.tasks[+pick('task').value];
const cards=pick('cards');cards.replaceChildren();if(!task)return;
const found=task.samples.filter(s=>s.answers[a]&&s.answers[b]&&s.answers[a].right!==s.answers[b].right);
pick('count').textContent=found.length+' shown';
found.forEach(s=>{const card=make('div',undefined,'card');
if(s.image){const i=make('img');i.src=s.image;i.alt=s.name;i.loading='lazy';card.append(i)}
card.append(make('small',s.id),make('pre',s.prompt));
[a,b].forEach(r=>{const x=s.answers[r],p=make('div');const k=make('span',undefined,'key');
k.style.background=data.colours[r];p.append(k,make('b',data.runs[r]+': '),
make('span',x.text||'(empty)',x.right>=1?'right':x.right<=0?'wrong':''));
p.append(make('small','read as: '+(x.read||'nothing')+' · '+(100*x.right).toFixed(0)+' %'));card.append(p)});
cards.append(card)})}
['task','a','b'].forEach(id=>pick(id).addEventListener('change',show));show();
"""


def page(runs: Sequence[ScoredRun], examples: Mapping[str, Sequence[Example[Any]]], *, samples: int) -> str:
    """The whole page."""
    columns = headlines(runs)
    keys = "".join(colour_key(index, run.name) + " &nbsp; " for index, run in enumerate(runs))
    notes = "".join(f"<small>{escape(note)}</small>" for note in footnotes(runs, columns))
    table = f'<div class="card">{_table(runs, columns)}</div>'
    sections = [
        ("At a glance", f"<p>{keys}<small>Dashed: published.</small></p>{_bars(runs, columns)}"),
        ("Every metric", "".join([*(_details(task, runs) for task in examples), *_unscored(runs)])),
    ]
    if len(runs) > 1:
        sections.append(("Where they disagree", _browser(runs, examples, samples)))
    return html_page(
        "Comparison",
        f"Small figures: difference from {runs[0].name}.",
        sections,
        top=table + notes,
        style=STYLE,
        script=SCRIPT if len(runs) > 1 else "",
    )


def disagreements(
    runs: Sequence[ScoredRun], task: str, examples: Sequence[Example[Any]], limit: int
) -> list[Example[Any]]:
    """Examples of which one run of some pair is righter than the other, at most `limit` a pair, spread over the set."""
    chosen: dict[str, Example[Any]] = {}
    for one, two in combinations([run for run in runs if task in run.scores], 2):
        first, second = one.scores[task].verdicts, two.scores[task].verdicts
        differing = [e for e in examples if e.id in first and first[e.id].right != second[e.id].right]
        step = max(1.0, len(differing) / max(limit, 1))
        chosen |= {e.id: e for e in (differing[int(n * step)] for n in range(min(limit, len(differing))))}
    return list(chosen.values())


def _bars(runs: Sequence[ScoredRun], columns: Sequence[Headline]) -> str:
    """One panel a headline; thin marks show published figures that may be compared."""
    panels = []
    for column in columns:
        found = [(run.name, run.figure(column)) for run in runs]
        published = [] if incomparable(column, runs) else references([column])
        marks = [(p.model, p.figures[column.key]) for p in published]
        # A bar's length is honest, it starts at zero; rates far below their best get a scale of their own.
        largest = max([value for _, value in found if value is not None] + [value for _, value in marks], default=0.0)
        panels.append(
            BarPanel(
                title=column.title,
                note="lower is better" if column.lower_is_better else "higher is better",
                bars=[(name, value, "–" if value is None else column.shown(value)) for name, value in found],
                largest=min(column.best, largest * 1.25),
                marks=[(f"{model}, published", value, column.shown(value)) for model, value in marks],
            )
        )
    return bar_panels("Scores of the compared models", panels)


def _table(runs: Sequence[ScoredRun], columns: Sequence[Headline]) -> str:
    head = "".join(f"<th>{escape(c.title)} {'↓' if c.lower_is_better else '↑'}</th>" for c in columns)
    lines = [f"<tr><th>model</th>{head}</tr>"]
    for index, run in enumerate(runs):
        cells = [_cell(c, run.figure(c), None if index == 0 else runs[0].figure(c)) for c in columns]
        lines.append(f"<tr><td>{colour_key(index, run.name)}</td>{''.join(cells)}</tr>")
    for published in references(columns):
        cells = []
        for column in columns:
            other = incomparable(column, runs)
            base = None if other else runs[0].figure(column)
            cells.append(_cell(column, published.figures.get(column.key), base, "†" if other else ""))
        name = f"{escape(published.model)}<small>published</small>"
        lines.append(f'<tr class="published"><td>{name}</td>{"".join(cells)}</tr>')
    counts = []
    for column in columns:
        found = [str(run.scores[column.task].n) for run in runs if column.task in run.scores]
        counts.append(f"<td><small>n {' / '.join(dict.fromkeys(found))}</small></td>")
    return f"<table>{''.join(lines)}<tr><td></td>{''.join(counts)}</tr></table>"


def _cell(column: Headline, value: float | None, base: float | None, mark: str = "") -> str:
    if value is None:
        return "<td>–</td>"
    return f"<td>{column.shown(value)}{mark}<small>{difference(column, value, base)}</small></td>"


def _details(task: str, runs: Sequence[ScoredRun]) -> str:
    scored = [run for run in runs if task in run.scores]
    names = dict.fromkeys(name for run in scored for name in run.scores[task].metrics)
    head = "".join(f"<th>{escape(run.name)}</th>" for run in scored)
    lines = [f"<tr><th>metric</th>{head}</tr>"]
    for name in names:
        values = [run.scores[task].metrics.get(name) for run in scored]
        cells = "".join(f"<td>{'–' if value is None else format(value, '.4f')}</td>" for value in values)
        lines.append(f"<tr><td>{escape(name)}</td>{cells}</tr>")
    for title in ("n", "n_missing", "n_unparsed"):
        cells = "".join(f"<td>{getattr(run.scores[task], title)}</td>" for run in scored)
        lines.append(f"<tr><td>{title}</td>{cells}</tr>")
    protocols = "".join(
        f"<p><b>{escape(run.name)}</b><br><code>{escape(run.scores[task].protocol)}</code><br>"
        f"<code>data sha256 {run.scores[task].data_sha256}</code></p>"
        for run in scored
    )
    return f"<details><summary>{task}</summary><table>{''.join(lines)}</table>{protocols}</details>"


def _unscored(runs: Sequence[ScoredRun]) -> list[str]:
    return [
        f"<p>{escape(run.name)}, {task}: not scored: {escape(why)}</p>"
        for run in runs
        for task, why in run.unscored.items()
    ]


def _browser(runs: Sequence[ScoredRun], examples: Mapping[str, Sequence[Example[Any]]], samples: int) -> str:
    tasks = []
    for task, asked in examples.items():
        found = [_sample(runs, task, example) for example in disagreements(runs, task, asked, samples)]
        if found:
            tasks.append({"task": task, "samples": found})
    colours = [colour(index) for index in range(len(runs))]
    content = {"runs": [run.name for run in runs], "colours": colours, "tasks": tasks}
    return (
        '<div class="controls"><label>benchmark <select id="task"></select></label>'
        '<label>one <select id="a"></select></label><label>other <select id="b"></select></label>'
        f'<span id="count"></span></div><div class="cards" id="cards"></div>{json_block("samples", content)}'
    )


def _sample(runs: Sequence[ScoredRun], task: str, example: Example[Any]) -> dict[str, Any]:
    answers: list[dict[str, Any] | None] = []
    for run in runs:
        score = run.scores.get(task)
        verdict = None if score is None else score.verdicts.get(example.id)
        if score is None or verdict is None:
            answers.append(None)
        else:
            text = score.texts[example.id] or ""
            answers.append({"text": text, "read": verdict.read_as, "right": verdict.right})
    return {
        "id": example.id,
        "name": example.image,
        "prompt": example.prompt,
        "image": _thumbnail(example),
        "answers": answers,
    }


def _thumbnail(example: Example[Any]) -> str:
    """A small copy of the image as a data URI; empty where there is none or it cannot be read."""
    if example.source is None:
        return ""
    try:
        return thumbnail(example.source.read(), name=f"question '{example.id}'")[0]
    except (DataError, EvalError):
        return ""
