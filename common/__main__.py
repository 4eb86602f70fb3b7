"""``python -m common``: what is done with checkpoints from a terminal. The words; the work is in commands.py.

python -m common list MnistTorchFlow
python -m common keep-running -- python mnist_torch_vanilla/flow.py run --epochs 50
"""

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

try:
    import click
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Table
    from rich.text import Text
except ImportError as missing:
    print(f"error: the command line needs {missing.name}: pip install click rich", file=sys.stderr)
    sys.exit(2)

from . import commands, publish
from .commands import Checkpoint, Planned
from .errors import CheckpointError, InvalidCheckpoint
from .hub import HubError

PACKAGE = __package__ or "common"
NAME = f"python -m {PACKAGE}"
COMPLETE = "_CHECKPOINTS_COMPLETE"
HELP = f"""Look at, check, compare, export, publish and delete checkpoints, on a laptop's disk or on S3.

A TARGET is a flow, a run, a step or a task (Flow/run/step/task or the beginning of it) on the datastore that Metaflow
is configured for, also of flows with plain @checkpoint, also of a task that is running; or a directory of checkpoints;
or the key of a checkpoint. TARGET@92, TARGET@NAME and TARGET@latest name one checkpoint of it.

Exit status: 0 fine, 1 something is wrong with a checkpoint, 2 bad usage or not found. With --json the output is for
scripts; progress and errors go to standard error.

\b
Examples:
  {NAME} list MnistTorchFlow
  {NAME} verify MnistTorchFlow/42
  {NAME} export MnistTorchFlow/42@276 weights --format safetensors
  {NAME} prune MnistTorchFlow --keep-last 1 --keep-best val_loss:min
  {NAME} push MnistHuggingFaceFlow/42 user/digits

\b
Completion, under the name checkpoints (the second line for ~/.bashrc; zsh_source and fish_source likewise):
  printf '#!/bin/sh\\nexec {NAME} "$@"\\n' > ~/.local/bin/checkpoints; chmod +x ~/.local/bin/checkpoints
  eval "$({COMPLETE}=bash_source checkpoints)"
"""

out = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
err = Console(stderr=True, highlight=False)


@click.group(help=HELP, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.pass_context
def cli(context: click.Context) -> None:
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def command(name: str, short: str, more: str, *examples: str, json_option: bool = True) -> Callable[[Any], Any]:
    """A command of the group, with examples under its help and, for those that read, ``--json``."""
    lines = "\n".join(f"  {NAME} {example}" for example in examples)
    text = f"{short} {more}\n\n\b\nExamples:\n{lines}"

    def decorate(function: Any) -> Any:
        if json_option:
            function = click.option("--json", "as_json", is_flag=True, help="Plain JSON, for scripts.")(function)
        return cli.command(name, help=text, short_help=short)(function)

    return decorate


@command("list", "List checkpoints.", "Each with its step, metrics, size, age, whether it is valid, and why it was "
         "kept. Valid means here that the manifest is whole and no file is missing or, on a local disk, cut short; "
         "verify reads every byte. Without TARGET: everything on the datastore.",
         "list MnistTorchFlow", "list MnistTorchFlow/42/train --json", "list checkpoints/")  # fmt: skip
@click.argument("target", default="")
def list_(target: str, as_json: bool) -> None:
    with waiting():
        place, found = commands.find(target)
    if as_json:
        return say([item.plain() for item in found])
    for task in dict.fromkeys(item.task for item in found):
        events = place.events.get(task, [])
        attempts = sum(event["event"] == "started" for event in events)
        resumed = [str(event["step"]) for event in events if event["event"] == "resumed"]
        notes = [f"{attempts} attempt{'' if attempts == 1 else 's'}"] if attempts else []
        notes += [f"resumed at step {', '.join(resumed)}"] if resumed else []
        out.print(Text(task, "bold"), Text("  " + "; ".join(notes), "dim"), sep="")
        out.print(table([item for item in found if item.task == task]))
    for fault in place.faults:
        err.print(f"warning: {fault}", markup=False)
    if not found:
        out.print("There are no checkpoints on this datastore.")


@command("show", "Show everything about one checkpoint.", "Its files, configuration, environment, and what happened.",
         "show MnistTorchFlow/42", "show MnistTorchFlow/42@92", "show checkpoints/@best-so-far")  # fmt: skip
@click.argument("target")
def show(target: str, as_json: bool) -> None:
    with waiting():
        place, item = commands.find_one(target)
    manifest = item.manifest
    details: dict[str, Any] = item.plain()
    if manifest:
        details |= {
            "resumed_from": manifest.resumed_from,
            "config": manifest.config,
            "environment": manifest.environment,
            "files": {name: [info.size, info.xxh3_128] for name, info in manifest.files.items()},
        }
    details["events"] = [
        event for event in place.events.get(item.task, []) if event["event"] not in ("saved", "deleted")
    ]
    if as_json:
        return say(details)
    grid = Table.grid("", "", padding=(0, 2))
    grid.columns[1].overflow = "fold"
    valid = "no manifest" if not item.entry.managed else item.fault or "yes"
    rows: list[tuple[str, str]] = [
        ("checkpoint", item.label + (f", epoch {item.entry.epoch}" if item.entry.epoch is not None else "")),
        ("task", item.task if item.attempt is None else f"{item.task}, attempt {item.attempt}"),
        ("key", item.entry.key),
        ("created", f"{item.created:%Y-%m-%d %H:%M:%S} UTC, {age(item.created)} ago"),
        ("size", size(item.size)),
        ("valid", valid),
        ("kept as", ", ".join(item.kept)),
        ("metrics", pairs(item.entry.metrics)),
        ("metadata", pairs(item.metadata)),
    ]
    if manifest:
        rows += [
            ("resumed from", ", ".join(f"step {step}" for step in manifest.resumed_from)),
            ("config", pairs(manifest.config)),
            ("environment", pairs(manifest.environment)),
            *(("file", f"{name}  {size(info.size)}  {info.xxh3_128}") for name, info in manifest.files.items()),
        ]
    for event in details["events"]:
        rest = {name: value for name, value in event.items() if name not in ("event", "time", "where", "source", "pid")}
        rows.append((f"{event['time'][11:19]}", f"{event['event']}  {pairs(rest)}"))
    for name, value in rows:
        if value:
            grid.add_row(Text(name, "dim"), Text(value))
    out.print(grid)


@command("verify", "Check every file by its hash.", "Reads all of it and compares with the sizes and hashes of the "
         "manifest. Names the bad files, and ends with status 1 when there is one.",
         "verify MnistTorchFlow/42", "verify MnistTorchFlow/42@92", "verify checkpoints/")  # fmt: skip
@click.argument("target")
def verify(target: str, as_json: bool) -> None:
    with waiting():
        place, found = commands.find(target)
    results: list[tuple[Checkpoint, dict[str, Any]]] = []
    with progress("verifying", sum(item.size or 0 for item in found)) as tick:
        for item in found:
            try:
                faults = commands.check(place, item, tick)
            except commands.Deleted:
                line = f"{item.task}  {item.label}  was deleted by its training meanwhile"
                err.print(line, markup=False, soft_wrap=True)
                continue
            valid = None if faults is None else not faults
            results.append((item, {**item.plain(), "valid": valid, "faults": faults or []}))
    bad = sum(result["valid"] is False for _, result in results)
    if as_json:
        say([result for _, result in results])
    for item, result in results if not as_json else ():
        words = {True: ("valid", "green"), False: ("BAD", "bold red"), None: ("no manifest, cannot be told", "yellow")}
        word, style = words[result["valid"]]
        reasons = f": {'; '.join(result['faults'])}" if result["faults"] else ""
        out.print(f"{item.task}  {item.label}  ", Text(word, style), reasons, sep="", markup=False)
    for fault in place.faults:
        err.print(f"BAD: {fault}", markup=False)
    if bad or place.faults:
        click.get_current_context().exit(1)


@command("diff", "Compare two checkpoints.", "Which tensors changed, and by how much; metrics, configuration, "
         "environment. The largest change is an absolute one; the relative one is that of the whole tensor "
         "(Euclidean norm).",
         "diff MnistTorchFlow/42@92 MnistTorchFlow/42@276", "diff MnistTorchFlow/42 MnistTorchFlow/43")  # fmt: skip
@click.argument("a")
@click.argument("b")
@click.option("--all", "everything", is_flag=True, help="Show every tensor, not the twelve that changed most.")
def diff(a: str, b: str, everything: bool, as_json: bool) -> None:
    with waiting():
        left, right = commands.find_one(a), commands.find_one(b)
    with progress("comparing", left[1].size or 0) as tick:
        result = commands.compare(left, right, tick)
    if as_json:
        return say(result)
    for title in ("position", "metrics", "config", "environment"):
        for line in result.get(title, []):
            out.print(Text(f"{title:12} ", "dim"), line, sep="", markup=False)
    tensors = result["tensors"]
    grid = columns("tensor", "shape", ">changed", ">largest", ">relative")
    for item in tensors if everything else tensors[:12]:
        kind = f"{item['dtype']} {shape(item['shape'])}"
        if "other" in item:
            kind += f" -> {item['other'][0]} {shape(item['other'][1:])}"
        changed = "" if item["changed"] is None else f"{item['changed']:.1%}"
        grid.add_row(item["name"], kind, changed, number(item["largest"]), number(item["relative"]))
    if tensors:
        out.print(grid)
    if len(tensors) > 12 and not everything:
        out.print(f"and {len(tensors) - 12} more, which changed less (--all shows them)")
    out.print(f"{len(tensors)} tensors differ, {result['equal']} are equal bit for bit")
    for side in ("a", "b"):
        for name in result[f"only_in_{side}"]:
            out.print(f"only in {a if side == 'a' else b}: {name}", markup=False)
    for name in result["files"]:
        out.print(f"differs: {name}", markup=False)


@command("export", "Write one checkpoint to a directory.", "It must be empty or new; hashes are checked first. "
         "Formats: files, all of them as they are; safetensors, the weights of a state under their plain names in "
         "model.safetensors; hf, what a framework's save_pretrained wrote.",
         "export MnistTorchFlow/42 best/", "export MnistTorchFlow/42@276 weights/ --format safetensors",
         json_option=False)  # fmt: skip
@click.argument("target")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--format", "form", type=click.Choice(["files", "safetensors", "hf"]), default="files", show_default=True)
@click.option("--part", default="model", show_default=True, help="Which object of the state, for safetensors.")
def export(target: str, directory: Path, form: str, part: str) -> None:
    with waiting():
        place, item = commands.find_one(target)
    with progress("checking", item.size or 0) as tick:
        files = commands.export(place, item, directory.expanduser(), form, part, tick)
    if not item.entry.managed:
        err.print("warning: it has no manifest, so nobody can tell whether its files are whole", markup=False)
    out.print(f"{item.label} of {item.task}: {', '.join(files)} written to {directory}", markup=False)


@command("prune", "Delete checkpoints, after showing which.", "Of each task the newest valid one, the best by its own "
         "keep_best (or by --keep-best) and the named ones always stay, and tasks that have not finished are left "
         "alone: they may be running, or be resumed.",
         "prune MnistTorchFlow --keep-last 1 --keep-best val_loss:min", "prune MnistTorchFlow --older-than 7d --yes",
         "prune checkpoints/ --keep-last 2", json_option=False)  # fmt: skip
@click.argument("target")
@click.option("--keep-last", type=click.IntRange(1), help="Keep that many of the newest of each task.")
@click.option("--keep-best", metavar="METRIC[:min|max]", help="Keep the best of each task by this metric, too.")
@click.option("--older-than", metavar="AGE", help="Delete only what is older: 12h, 7d, 2w.")
@click.option("--unfinished", is_flag=True, help="Also tasks that have not finished. Only when you know they are dead.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def prune(
    target: str, keep_last: int | None, keep_best: str | None, older_than: str | None, unfinished: bool, yes: bool
) -> None:
    if keep_last is None and keep_best is None and older_than is None:
        raise CheckpointError("say what to keep: --keep-last, --keep-best, --older-than, or several of them")
    rules: dict[str, Any] = {
        "keep_last": keep_last,
        "keep_best": commands.parse_best(keep_best) if keep_best else None,
        "older_than": commands.parse_age(older_than) if older_than else None,
    }
    with waiting():
        place, found = commands.find(target)
        if len(found) < len(place.checkpoints):
            raise CheckpointError("prune takes a flow, run, step, task or directory: it decides about whole tasks")
        planned = commands.plan(place, found, **rules, unfinished=unfinished)
    show_plan(planned)
    doomed = [item.checkpoint for item in planned if item.delete]
    if not doomed:
        return
    if not yes and not click.confirm("Delete them?", err=True):
        return out.print("nothing was deleted")
    with place.deleter() as delete, progress("deleting", sum(item.size or 0 for item in doomed)) as tick:
        for item in doomed:
            delete(item)
            tick(item.size or 0)
    out.print(f"deleted {len(doomed)}")


def show_plan(planned: Sequence[Planned]) -> None:
    for task in dict.fromkeys(item.checkpoint.task for item in planned):
        mine = [item for item in planned if item.checkpoint.task == task]
        if {item.why for item in mine} == {"its task has not finished"}:
            out.print(Text(task, "bold"), f"  kept: {mine[0].why} (--unfinished takes it, too)", sep="", markup=False)
            continue
        out.print(Text(task, "bold"))
        grid = columns("", ">step", "name", "metrics", ">size", ">age", "why")
        for item in mine:
            one = item.checkpoint
            word = Text("delete", "red") if item.delete else Text("keep", "green")
            why = "" if item.delete else item.why
            name = one.entry.name or ""
            grid.add_row(word, step(one), name, pairs(one.entry.metrics), size(one.size), age(one.created), why)
        out.print(grid)
    doomed = [item.checkpoint for item in planned if item.delete]
    total = sum(item.size or 0 for item in doomed)
    out.print(f"{len(doomed)} of {len(planned)} to delete, {size(total)}" if doomed else "nothing to delete")


@command("push", "Push a model or a checkpoint to the Hugging Face Hub.", "A TARGET that is a run, step or task is the "
         "model that it saved with current.model.save or, if there is none, its newest checkpoint; @STEP, @NAME and "
         "@latest name a checkpoint, @LABEL a model. Weights as safetensors, configurations, tokenizer and a model "
         "card travel; pickles and paths of this machine do not. A new repository is private. What is there already "
         "makes no commit. Names under local/ are on the loopback hub.",
         "push MnistHuggingFaceFlow/42 user/digits --license mit", "push MnistHuggingFaceFlow/42@92 user/digits",
         "push checkpoints/@latest local/digits")  # fmt: skip
@click.argument("target")
@click.argument("repo")
@click.option("--public", is_flag=True, help="A new repository becomes public, and an existing one may be.")
@click.option("--license", "license_", default="", help="Of the model, such as apache-2.0.")
@click.option("--language", multiple=True, help="Such as en; may be repeated.")
@click.option("--tag", multiple=True, help="For the model card; may be repeated.")
@click.option("--base-model", default="", metavar="ORG/NAME[@COMMIT]", help="Where the run does not say it.")
@click.option("--dataset", default="", metavar="NAME[@COMMIT]", help="Where the run does not say it.")
@click.option("--with-checkpoint", is_flag=True, help="Also all that it takes to train on, in last-checkpoint/.")
@click.option("--message", default="", help="Of the commit.")
def push(target: str, repo: str, public: bool, license_: str, language: Sequence[str], tag: Sequence[str],
         base_model: str, dataset: str, with_checkpoint: bool, message: str, as_json: bool) -> None:  # fmt: skip
    about = publish.About(base_model, dataset, license_, tuple(language), tuple(tag))
    publish.set_up_client(repo, timeout=60, progress=sys.stderr.isatty())
    done = publish.push_target(target, repo, about, private=not public, checkpoint=with_checkpoint, message=message)
    if as_json:
        return say(dataclasses.asdict(done))
    where = repo if repo.startswith("local/") else done.url
    end = f": {', '.join(done.files)}" if done.files else "; it was there already"
    seen = "private" if done.private else "public"
    out.print(f"{done.what} is in {where} ({seen}), commit {done.commit[:8]}{end}", markup=False, soft_wrap=True)


@command("keep-running", "Run a flow, however often it fails.", "When it fails for good (Metaflow retries a task "
         "four times at most), resumes it from its newest checkpoint, until it succeeds or three runs in a row get no "
         "further.",
         "keep-running -- python mnist_torch_vanilla/flow.py run --epochs 50", json_option=False)  # fmt: skip
@click.argument("words", metavar="-- python FLOW.py run ...", nargs=-1, required=True, type=click.UNPROCESSED)
def keep_running(words: Sequence[str]) -> None:
    click.get_current_context().exit(commands.keep_running(list(words)))


# -------------------------------------------------------------------- words


def say(value: Any) -> None:
    print(json.dumps(value, indent=1))


def columns(*names: str) -> Table:
    """A table; ``>name`` is aligned to the right."""
    grid = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    for name in names:
        numeric = name.startswith(">")
        grid.add_column(name.lstrip(">"), justify="right" if numeric else "left", no_wrap=numeric, overflow="fold")
    return grid


def table(found: Sequence[Checkpoint]) -> Table:
    grid = columns(">step", ">epoch", "name", "metrics", ">size", ">age", "valid", "kept as")
    for item in found:
        entry = item.entry
        valid = Text(item.fault, "bold red") if item.fault else Text("yes" if entry.managed else "?")
        grid.add_row(step(item), "" if entry.epoch is None else str(entry.epoch), entry.name or "",
                     pairs({**entry.metrics, **item.metadata}), size(item.size), age(item.created), valid,
                     ", ".join(item.kept))  # fmt: skip
    return grid


def step(item: Checkpoint) -> str:
    return str(item.entry.step) if item.entry.step >= 0 else ""


def pairs(values: dict[str, Any]) -> str:
    return "  ".join(f"{name} {number(value)}" for name, value in values.items())


def number(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def shape(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes)) or "scalar"


def size(count: int | None) -> str:
    if count is None:
        return "?"
    value, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while value >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.3g} {units[0]}"


def age(moment: datetime) -> str:
    seconds = max(0.0, (datetime.now(UTC) - moment).total_seconds())
    for length, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


@contextmanager
def waiting() -> Generator[None]:
    """A sign of life while the datastore is read; only on a terminal."""
    if sys.stderr.isatty():
        with err.status("reading"):
            yield
    else:
        yield


@contextmanager
def progress(what: str, total: int) -> Generator[commands.Tick]:
    """A bar that counts bytes; only on a terminal."""
    parts = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*parts, console=err, transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return its exit status."""
    try:
        # the name under which bash completes: no completion can be had for "python -m ..."
        name = "checkpoints" if COMPLETE in os.environ else NAME
        return cli.main(arguments, prog_name=name, complete_var=COMPLETE, standalone_mode=False) or 0
    except click.ClickException as error:
        return fail(error.format_message(), 2)
    except click.Abort:
        return fail("nothing was done", 2)
    except InvalidCheckpoint as error:
        return fail(str(error), 1)
    except (CheckpointError, HubError) as error:
        return fail(str(error), 2)
    except Exception as error:  # of the datastore: credentials, network, permissions
        first = next(iter(str(error).strip().splitlines()), "")
        return fail(f"{type(error).__name__}: {first}", 2)


def fail(message: str, status: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
