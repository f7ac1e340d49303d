"""`eval-student`: answer benchmarks' questions, score and export answers, compare models, copy for other tools."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from eval.tasks import TASKS
from llavamod_offline.config.command import Arguments, Commands, PrintConfig, settings_command
from llavamod_offline.entrypoint import run_command

if TYPE_CHECKING:
    from eval.generate import EvalGenerateConfig

app = typer.Typer(
    cls=Commands,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Answer benchmarks' questions with a student, score the answers, and compare models.",
)

_TASKS = " ".join(TASKS)

_GENERATE_HELP = f"""Answer the questions of one or more benchmarks with a model.

Answers go to OUTPUT/TASK/predictions.jsonl. Rerun the same command to resume.

engine=hf runs a model of any family in transformers, engine=vllm in vLLM (use a larger batch_size); engine=processor
runs an image-text-to-text checkpoint entirely with its own chat template and processor. Without max_new_tokens, each
benchmark's published limit applies.

Benchmarks: {_TASKS}

\b
Examples:
  eval-student generate eval.yaml
  eval-student generate eval.yaml 'tasks=[pope,gqa]' batch_size=16
  eval-student generate model=runs/student root=data/eval output=runs/eval 'tasks=[pope]' limit=100
"""

_SCORE_HELP = f"""Score a predictions file on a benchmark, without loading a model.

PREDICTIONS is a predictions.jsonl, an answer file of LLaVA's scripts (question_id, text, prompt), logged samples of
lmms-eval, or a table of VLMEvalKit. Scores are averaged over every question of the benchmark's file or, if the answers
were generated with limit=N, over its first N. Rates are fractions of 1; MME scores are points.

Benchmarks: {_TASKS}

\b
Examples:
  eval-student score pope --root data/eval --predictions runs/eval/pope/predictions.jsonl
  eval-student score gqa --root data/eval --predictions answers.jsonl --output score.json
  eval-student score mmhal --root data/eval --predictions runs/eval/mmhal/predictions.jsonl \\
      --judge http://localhost:8000/v1 --judge-model Qwen3-32B
  eval-student score mmhal --root data/eval --predictions runs/eval/mmhal/predictions.jsonl --judge replies.jsonl
"""

_EXPORT_HELP = """Write a predictions file in another tool's format.

The suffix of OUTPUT chooses the format: .jsonl for LLaVA's scripts, .xlsx for MMBench's server, .json for VizWiz's
server and GQA's script.

\b
Examples:
  eval-student export mmbench --root data/eval --predictions runs/eval/mmbench/predictions.jsonl -o upload.xlsx
  eval-student export pope --root data/eval --predictions runs/eval/pope/predictions.jsonl -o answers.jsonl
"""

_REPORT_HELP = """Compare models: scores side by side, with published figures.

A RUN is an output folder of 'generate'; its predictions are rescored. OUTPUT ends in .html or .md. The .html page
is self-contained; it lets you choose the baseline, and shows the questions on which models disagree (for a single run,
those that it answers wrong), with their images and reference answers.

\b
Examples:
  eval-student report runs/dense runs/sparse --root data/eval -o report.html
  eval-student report evals/* --root data/eval -o report.md
"""

_PORTABLE_HELP = """Write a copy of a LLaVA folder for other tools: lmms-eval, a chat server, a pipeline.

Students trained by train-student do not need this. The copy has the template as a chat template, its end token, an
image processor that pads as in training, and tensor names that transformers 4 and 5 read.

\b
Examples:
  eval-student portable llava-from-elsewhere -o llava-portable
  eval-student portable llava-from-elsewhere -o llava-portable --template chatml --image-aspect square
"""


def _schema() -> type[EvalGenerateConfig]:
    from eval.generate import EvalGenerateConfig

    return EvalGenerateConfig


AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Root = Annotated[Path, typer.Option(help="Folder with the benchmarks' files, in LLaVA-1.5's layout.")]
Predictions = Annotated[Path, typer.Option(help="predictions.jsonl, or LLaVA-style answers.")]
TaskName = Annotated[str, typer.Argument(metavar="TASK", help="The benchmark's name.")]


def generate_command(arguments: Arguments = None, print_config: PrintConfig = False, as_json: AsJson = False) -> None:
    from eval.generate import EvalGenerateConfig, generate
    from llavamod_offline.config import load_config, split_arguments
    from llavamod_offline.config import print_config as print_settings

    given = split_arguments(arguments or [])
    if print_config:
        print_settings(EvalGenerateConfig, *given)
        return
    done = generate(load_config(EvalGenerateConfig, *given))
    if as_json:
        print(json.dumps({task: str(path) for task, path in done.items()}, ensure_ascii=False))
        return
    for task, path in done.items():
        print(f"{task}: {path}")


def score_command(
    task: TaskName,
    root: Root,
    predictions: Predictions,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Also write the score to this file, as JSON."),
    ] = None,
    as_json: AsJson = False,
    allow_missing: Annotated[bool, typer.Option("--allow-missing", help="Count missing answers as wrong.")] = False,
    judge: Annotated[
        str | None,
        typer.Option(help="URL of a chat server, a model's folder or Hub id, or a file of recorded replies."),
    ] = None,
    judge_model: Annotated[str, typer.Option(help="The judge's model, if the server or record has several.")] = "",
    judge_template: Annotated[Path | None, typer.Option(help="Your own wording of the judge's question.")] = None,
    judge_record: Annotated[
        Path | None,
        typer.Option(help="File that records replies [default: beside the predictions]", show_default=False),
    ] = None,
    judge_max_tokens: Annotated[
        int | None, typer.Option(help="Limit on a reply's tokens; reasoning models need more [default: 512].")
    ] = None,
    judge_key_variable: Annotated[str, typer.Option(help="Environment variable that holds the server's key.")] = "",
) -> None:
    from eval.predictions import refuse_own_input
    from eval.score import score_task
    from llavamod_offline.errors import ConfigError
    from llavamod_offline.storage.atomic import write_file

    if output is not None:
        refuse_own_input(output, predictions)
    judging = None
    if judge is not None:
        from eval.judge import open_judge

        judging = open_judge(judge, model=judge_model, key_variable=judge_key_variable, max_tokens=judge_max_tokens)
    elif judge_model or judge_template or judge_record or judge_key_variable or judge_max_tokens is not None:
        raise ConfigError("the options --judge-… need --judge: name the judge")
    score = score_task(
        task,
        root,
        predictions,
        allow_missing=allow_missing,
        judge=judging,
        judge_record=judge_record,
        judge_template=judge_template,
    )
    if as_json:
        print(json.dumps(score.as_json(), ensure_ascii=False))
    else:
        width = max(len(name) for name in score.metrics)
        for name, value in score.metrics.items():
            print(f"{name:<{width}}  {'undefined' if value is None else format(value, '.4f')}")
        print(f"{score.counts}, data sha256 {score.data_sha256[:16]}…")
        print(score.protocol)
    if output is not None:  # after printing: a file that cannot be written loses no score
        output.parent.mkdir(parents=True, exist_ok=True)
        write_file(output, json.dumps(score.as_json(), indent=2, ensure_ascii=False) + "\n")


def export_command(
    task: TaskName,
    root: Root,
    predictions: Predictions,
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write: .jsonl, .xlsx or .json.")],
    model: Annotated[str, typer.Option(help="Model name for LLaVA's answers.")] = "",
) -> None:
    from eval.export.answers import export

    export(task, root, predictions, output, model=model)
    print(output)


def report_command(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Output folders of 'generate'.")],
    root: Root,
    output: Annotated[Path, typer.Option("--output", "-o", help="Page to write: .html or .md.")],
    samples: Annotated[int, typer.Option(help="Limit on questions shown per benchmark and pair of runs.")] = 24,
    judge_model: Annotated[str, typer.Option(help="The judge whose replies to read, if several are recorded.")] = "",
    judge_template: Annotated[
        Path | None, typer.Option(help="The wording that the judge was asked with, if it is your own.")
    ] = None,
) -> None:
    from eval.report.report import write_report

    write_report(runs, root, output, samples=samples, judge_model=judge_model, judge_template=judge_template)
    print(output)


def portable_command(
    student: Annotated[Path, typer.Argument(metavar="STUDENT", help="Folder or Hub id of a LLaVA checkpoint.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; it must not exist.")],
    template: Annotated[str, typer.Option(help="Template used in training; auto: as the folder states.")] = "auto",
    image_aspect: Annotated[
        str, typer.Option(help="Image handling in training: pad, square, or auto, as the folder states (else pad).")
    ] = "auto",
) -> None:
    from eval.export.portable import write_portable
    from llavamod_offline.models.hub import checkpoint_folder

    write_portable(checkpoint_folder(student), output, template=template, image_aspect=image_aspect)
    print(output)


app.command("generate", cls=settings_command(_schema), help=_GENERATE_HELP)(generate_command)
app.command("score", help=_SCORE_HELP)(score_command)
app.command("export", help=_EXPORT_HELP)(export_command)
app.command("report", help=_REPORT_HELP)(report_command)
app.command("portable", help=_PORTABLE_HELP)(portable_command)


def main() -> None:
    """Run the command line."""
    run_command(app)
