"""What comes after the training, with LLaMA-Factory's own commands: merge the adapter, and talk to the result."""

import os
import subprocess
import tempfile
from functools import partial
from pathlib import Path

from train import HERE, environment, executable

from common import die_with_parent


def merge(base_model: Path, adapter: Path, target: Path) -> Path:
    """``llamafactory-cli export merge.yaml``: a model with the adapter in its weights, in ``target``."""
    work = Path(tempfile.mkdtemp(dir=target.parent))
    done = _run(work, "export", "merge.yaml", base_model=base_model, adapter=adapter)
    if done.returncode:
        raise RuntimeError(f"llamafactory-cli export ended with status {done.returncode}:\n{done.stderr[-3000:]}")
    (work / "merged").rename(target)
    return target


def ask(model: Path, question: str) -> str:
    """``llamafactory-cli chat infer.yaml``, with the question typed in. Returns the answer."""
    with tempfile.TemporaryDirectory() as work:
        done = _run(Path(work), "chat", "infer.yaml", typed=f"{question}\nexit\n", merged=model)
    answer, prompt, _ = done.stdout.partition("Assistant: ")[2].rpartition("\nUser: ")
    if not prompt:  # its status means nothing: after `exit` it may abort, with a thread that still runs
        raise RuntimeError(f"llamafactory-cli chat gave no answer, status {done.returncode}:\n{done.stderr[-3000:]}")
    return answer.strip()


def _run(work: Path, command: str, file: str, typed: str = "", **links: Path) -> subprocess.CompletedProcess[str]:
    """Run a command in ``work``, where ``links`` lie under the names that the YAML file has for them."""
    for name, path in links.items():
        (work / name).symlink_to(path.resolve())
    return subprocess.run(
        [executable(), command, str(HERE / file)], cwd=work, env=environment(), input=typed, text=True,
        capture_output=True, preexec_fn=partial(die_with_parent, os.getpid()),
    )  # fmt: skip
