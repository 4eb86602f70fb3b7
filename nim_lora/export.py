"""Write the adapter of a run where NVIDIA NIM looks for adapters: a directory with its name, in $NIM_PEFT_SOURCE.

python nim_lora/export.py                              # of your newest finished run; without the variable to adapters/
python nim_lora/export.py RUN --name helpdesk-v2       # of this run, under another name
"""

import argparse
import errno
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from common.scratch import Scratch

FLOW = "NimLoraFlow"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAX_LORA_RANK = 32  # serve.py starts the server with it


class ExportError(Exception):
    """The adapter cannot be served; the message says why and what to do."""


def check_name(name: str) -> None:
    """Raise ExportError for what cannot be the name of an adapter and its directory."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        raise ExportError(f"{name!r} is no name for an adapter: take letters, digits, '.', '-' and '_'")


def check_rank(rank: int, max_lora_rank: int) -> None:
    """Raise ExportError for a rank that a server with this limit would refuse."""
    if rank > max_lora_rank:
        raise ExportError(
            f"the rank of the adapter is {rank}, and the server takes {max_lora_rank} at most: train with a smaller "
            f"--lora-r, or say --max-lora-rank {rank} here and to serve.py"
        )


def check_adapter(directory: Path, max_lora_rank: int = MAX_LORA_RANK) -> dict[str, Any]:
    """What adapter_config.json says, after both files were found to be what NIM can load.

    Raises ExportError: a file is missing or not whole, it is no plain LoRA, its rank is above the limit, or the base
    model is not named as the Hub names it.
    """
    try:
        settings = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
        with safe_open(directory / WEIGHTS, framework="np") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, ValueError, SafetensorError) as error:
        raise ExportError(f"{directory} has no adapter that can be read: {error}") from error
    base = str(settings.get("base_model_name_or_path"))
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", base):
        raise ExportError(f"the base model is {base!r}: other machines need its name on the Hub, such as org/model")
    if settings.get("peft_type") != "LORA":
        raise ExportError(f"the adapter is of the type {settings.get('peft_type')}, and NIM loads LORA only")
    ranks = set()
    for name, shape in shapes.items():
        matrix = re.search(r"\.lora_([AB])\.weight$", name)
        if not matrix:
            raise ExportError(
                f"the adapter has {name}, which is no matrix of a plain LoRA: train without DoRA, biases and "
                "modules_to_save"
            )
        ranks.add(shape[0] if matrix[1] == "A" else shape[1])
    if not ranks or settings.get("r") not in ranks:
        raise ExportError(f"{CONFIG} says rank {settings.get('r')}, but {WEIGHTS} has {sorted(ranks) or 'no matrices'}")
    check_rank(max(ranks), max_lora_rank)
    return settings


def export_adapter(adapter: Path, source: Path, name: str, max_lora_rank: int = MAX_LORA_RANK) -> Path:
    """Copy an adapter to ``source/name``. NIM looks into ``source`` at any time: it sees all of it or nothing.

    The same adapter under the same name is left alone, so that this can be repeated.

    Raises ExportError: see :func:`check_adapter`; the name is none for a directory, or another adapter has it.
    """
    check_name(name)
    check_adapter(adapter, max_lora_rank)
    target = source / name
    if target.exists():
        _check_same(adapter, target)
        return target
    source.mkdir(parents=True, exist_ok=True)
    scratch = Scratch(source.parent / f".{source.name}-unfinished")  # beside it, where NIM does not look
    try:
        staged = scratch.directory()
        for file in (CONFIG, WEIGHTS):
            shutil.copyfile(adapter / file, staged / file)  # what Metaflow loads may be a symlink, dead in a container
        check_adapter(staged, max_lora_rank)
        staged.rename(target)
    except OSError as error:
        if error.errno == errno.EXDEV:
            raise ExportError(f"{source} is a mount of its own: choose a directory inside of it") from error
        if not target.exists():
            raise
        _check_same(adapter, target)  # another export was faster
    finally:
        scratch.remove()
    return target


def _check_same(adapter: Path, target: Path) -> None:
    files = [target / file for file in (CONFIG, WEIGHTS)]
    if not all(file.is_file() and file.read_bytes() == (adapter / file.name).read_bytes() for file in files):
        raise ExportError(
            f"{target} is there and is another adapter. A running server would keep the old one under this name: give "
            f"the new one another --name, such as {target.name}-v2"
        )


def find_run(run_id: str = "") -> Any:
    """A finished run of the flow; by default the user's newest. Raises ExportError."""
    from metaflow import Flow, Run, namespace
    from metaflow.exception import MetaflowNamespaceMismatch, MetaflowNotFound

    try:
        if run_id:
            namespace(None)  # whoever ran it
            run = Run(f"{FLOW}/{run_id.removeprefix(f'{FLOW}/')}")
        else:
            run = Flow(FLOW).latest_successful_run
    except (MetaflowNotFound, MetaflowNamespaceMismatch):
        run = None
    if run is None or not run.successful:
        raise ExportError(
            f"there is no finished run {run_id or f'of {FLOW}'} in this datastore: run nim_lora/flow.py first, from "
            "this directory or with the same METAFLOW_ settings"
        )
    return run


def load(run: Any, artifact: str, directory: Path) -> Path:
    """Put a model of a run into a directory that does not exist; large files may be links into the datastore."""
    from metaflow import load_model

    directory.mkdir(parents=True)
    load_model(run["end"].task[artifact].data, str(directory))
    return directory


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those that export.py and serve.py share."""
    parser.add_argument("run", nargs="?", default="", help="id of a run; by default your newest finished one")
    parser.add_argument("--name", default="helpdesk", help="of the adapter: what clients ask for")
    parser.add_argument("--adapters", type=Path, default=Path(os.environ.get("NIM_PEFT_SOURCE", "adapters")),
                        help="where NIM looks for adapters; by default $NIM_PEFT_SOURCE, else adapters/")  # fmt: skip
    parser.add_argument("--max-lora-rank", type=int, default=MAX_LORA_RANK, help="limit of the server")


def export_run(run: Any, options: argparse.Namespace) -> Path:
    """Export the adapter of a run as the options say, and say where it is."""
    with tempfile.TemporaryDirectory() as scratch:
        adapter = load(run, "adapter", Path(scratch, "adapter"))
        target = export_adapter(adapter, options.adapters.absolute(), options.name, options.max_lora_rank)
    print(f"adapter {options.name} of {run.pathspec} is in {target}", flush=True)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the adapter of a run where NIM looks for adapters.")
    add_options(parser)
    options = parser.parse_args()
    try:
        export_run(find_run(options.run), options)
    except ExportError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
