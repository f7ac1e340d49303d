"""The comparison as one HTML page: table, bars, every metric, and a browser of disagreements. It loads nothing else.

What models or benchmarks wrote reaches the page as text (escaped, or through `textContent`), never as markup.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from html import escape
from itertools import combinations
from typing import Any

from eval.example import Example
from eval.published import Headline
from eval.report import Run, difference, footnotes, headlines, incomparable, references
from eval.report_svg import bars, colour
from llavamod_offline.errors import DataError, EvalError

THUMBNAIL_SIDE = 320

STYLE = """
:root{--fg:#1d2430;--muted:#667085;--line:#dde2ea;--bg:#fff;--soft:#f5f7fa;--good:#1a7f4e;--bad:#b3372f}
@media(prefers-color-scheme:dark){:root{--fg:#e6e9ef;--muted:#98a2b3;--line:#343b47;--bg:#14181f;--soft:#1d232c;
--good:#5ec795;--bad:#ef8a80}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--fg);background:var(--bg);max-width:1100px;margin:0 auto;
padding:24px}
h1{font-size:26px}h2{margin-top:40px;font-size:19px}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
.scroll{overflow-x:auto}th,td{padding:6px 10px;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left}tr.published{color:var(--muted)}small{color:var(--muted);display:block}
svg{width:100%;height:auto}svg text{fill:var(--fg);font:12px system-ui,sans-serif}
svg .title{font-weight:600;font-size:13px}
svg .small{fill:var(--muted);font-size:10px}svg .mark{stroke:var(--muted);stroke-width:1.5;stroke-dasharray:3 3}
.key{display:inline-block;width:11px;height:11px;border-radius:3px;margin-right:7px}
details{margin:8px 0;padding:8px 12px;background:var(--soft);border-radius:8px}summary{cursor:pointer}
code{font-size:12px;overflow-wrap:anywhere}.controls{display:flex;gap:12px;flex-wrap:wrap;margin:12px 0}
select{font:inherit;padding:4px;color:inherit;background:var(--soft);border:1px solid var(--line);border-radius:6px}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(300px,1fr));gap:16px}
.card{border:1px solid var(--line);border-radius:10px;padding:12px;overflow-wrap:anywhere}
.card img{max-width:100%;max-height:220px;display:block;margin:0 auto 8px;border-radius:6px}
.card pre{white-space:pre-wrap;font:inherit;margin:4px 0}.right{color:var(--good)}.wrong{color:var(--bad)}
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


def page(runs: Sequence[Run], examples: Mapping[str, Sequence[Example[Any]]], *, samples: int) -> str:
    """The whole page."""
    columns = headlines(runs)
    keys = "".join(_key(index, run.name) + " &nbsp; " for index, run in enumerate(runs))
    parts = [
        "<h1>Comparison</h1>",
        f'<div class="scroll">{_table(runs, columns)}</div>',
        f"<p><small>Small figures: difference from {escape(runs[0].name)}.</small></p>",
        *(f"<small>{escape(note)}</small>" for note in footnotes(runs, columns)),
        f"<h2>At a glance</h2><p>{keys}<small>Dashed: published.</small></p>{bars(runs, columns)}",
        "<h2>Every metric</h2>",
        *(_details(task, runs) for task in examples),
    ]
    for run in runs:
        parts += [f"<p>{escape(run.name)}, {task}: not scored: {escape(why)}</p>" for task, why in run.unscored.items()]
    if len(runs) > 1:
        parts.append(_browser(runs, examples, samples))
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Comparison</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'; script-src 'unsafe-inline'\">"
        f"<style>{STYLE}</style>{''.join(parts)}</html>\n"
    )


def disagreements(runs: Sequence[Run], task: str, examples: Sequence[Example[Any]], limit: int) -> list[Example[Any]]:
    """Examples of which one run of some pair is righter than the other, at most `limit` a pair, spread over the set."""
    chosen: dict[str, Example[Any]] = {}
    for one, two in combinations([run for run in runs if task in run.scores], 2):
        first, second = one.scores[task].verdicts, two.scores[task].verdicts
        differing = [e for e in examples if e.id in first and first[e.id].right != second[e.id].right]
        step = max(1.0, len(differing) / max(limit, 1))
        chosen |= {e.id: e for e in (differing[int(n * step)] for n in range(min(limit, len(differing))))}
    return list(chosen.values())


def _table(runs: Sequence[Run], columns: Sequence[Headline]) -> str:
    head = "".join(f"<th>{escape(c.title)} {'↓' if c.lower_is_better else '↑'}</th>" for c in columns)
    lines = [f"<tr><th>model</th>{head}</tr>"]
    for index, run in enumerate(runs):
        cells = [_cell(c, run.figure(c), None if index == 0 else runs[0].figure(c)) for c in columns]
        lines.append(f"<tr><td>{_key(index, run.name)}</td>{''.join(cells)}</tr>")
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


def _details(task: str, runs: Sequence[Run]) -> str:
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
    table = f'<div class="scroll"><table>{"".join(lines)}</table></div>'
    return f"<details><summary>{task}</summary>{table}{protocols}</details>"


def _browser(runs: Sequence[Run], examples: Mapping[str, Sequence[Example[Any]]], samples: int) -> str:
    tasks = []
    for task, asked in examples.items():
        found = [_sample(runs, task, example) for example in disagreements(runs, task, asked, samples)]
        if found:
            tasks.append({"task": task, "samples": found})
    colours = [colour(index) for index in range(len(runs))]
    content = json.dumps({"runs": [run.name for run in runs], "colours": colours, "tasks": tasks}, ensure_ascii=False)
    for letter in "<>&\u2028\u2029":
        content = content.replace(letter, f"\\u{ord(letter):04x}")
    return (
        '<h2>Where they disagree</h2><div class="controls"><label>benchmark <select id="task"></select></label>'
        '<label>one <select id="a"></select></label><label>other <select id="b"></select></label>'
        f'<span id="count"></span></div><div class="cards" id="cards"></div>'
        f'<script type="application/json" id="samples">{content}</script><script>{SCRIPT}</script>'
    )


def _sample(runs: Sequence[Run], task: str, example: Example[Any]) -> dict[str, Any]:
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
    """A small copy of the picture as a data URI; empty where there is none or it cannot be read."""
    from llavamod_offline.data.images import decode_image

    if example.source is None:
        return ""
    try:
        image = decode_image(example.source.read(), name=f"question '{example.id}'")
    except (DataError, EvalError):
        return ""
    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "PNG" if max(image.size) <= 96 else "JPEG", quality=85)
    kind = "png" if max(image.size) <= 96 else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _key(index: int, name: str) -> str:
    return f'<span class="key" style="background:{colour(index)}"></span>{escape(name)}'
