"""What comes after the training, with LLaMA-Factory's own commands: merge the adapter, and talk to the result."""

import json
import os
import shutil
import subprocess
import tempfile
from functools import partial
from pathlib import Path
from subprocess import CompletedProcess

import yaml
from train import HERE, environment, executable

from common import die_with_parent


def merge(base_model: Path, trained: Path, target: Path, chat: dict) -> Path:
    """``llamafactory-cli export merge.yaml``: a model with the adapter in its weights, in ``target``.

    Where all weights were trained, there is no adapter: the result of the training is the model.
    """
    if not (trained / "adapter_config.json").exists():
        return Path(shutil.copytree(trained, target))
    work = Path(tempfile.mkdtemp(dir=target.parent))
    done = _run(work, "export", "merge.yaml", chat | dtype(base_model), base_model=base_model, adapter=trained)
    if done.returncode:
        raise RuntimeError(f"llamafactory-cli export ended with status {done.returncode}:\n{done.stderr[-3000:]}")
    (work / "merged").rename(target)
    return target


def ask(model: Path, question: str, chat: dict) -> str:
    """``llamafactory-cli chat infer.yaml``, with the question typed in. Returns the answer."""
    with tempfile.TemporaryDirectory() as work:
        done = _run(Path(work), "chat", "infer.yaml", chat | dtype(model), f"{question}\nexit\n", merged=model)
    answer, prompt, _ = done.stdout.partition("Assistant: ")[2].rpartition("\nUser: ")
    if not prompt:  # its status means nothing: after `exit` it may abort, with a thread that still runs
        raise RuntimeError(f"llamafactory-cli chat gave no answer, status {done.returncode}:\n{done.stderr[-3000:]}")
    return answer.strip()


def dtype(model: Path) -> dict[str, str]:
    """``infer_dtype`` as the model's own; LLaMA-Factory's auto would round float32 to bfloat16."""
    config = json.loads((model / "config.json").read_text())
    found = config.get("dtype") or config.get("torch_dtype")  # the name of today, and that of most models on the Hub
    return {"infer_dtype": found if found in ("float16", "bfloat16", "float32") else "auto"}


def _run(work: Path, command: str, file: str, more: dict, typed: str = "", **links: Path) -> CompletedProcess[str]:
    """Run a command in ``work``, with ``more`` keys than the YAML file has, and ``links`` under its names for them."""
    for name, path in links.items():
        (work / name).symlink_to(path.resolve())
    arguments = yaml.safe_load((HERE / file).read_text(encoding="utf-8")) | more
    (work / file).write_text(yaml.safe_dump(arguments), encoding="utf-8")
    return subprocess.run(
        [executable(), command, file], cwd=work, env=environment(), input=typed, text=True,
        capture_output=True, preexec_fn=partial(die_with_parent, os.getpid()),
    )  # fmt: skip
