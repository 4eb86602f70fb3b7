"""Imports an example's train.py (or generate.py) once and runs many trainings of it in forked children.

The first line of standard input names the example; each further line is a scenario, answered by a line. The parent
only imports: a framework that has computed anything must not be forked.
"""

import gc
import hashlib
import importlib
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import preforked


def sabotage(name: str) -> None:
    """Take one protection away, to show that the tests would notice. Only called in a child."""
    from common import state

    original = state.TrainState.load_state_dict
    if name == "rng":
        state.set_rng_state = lambda states: None
    elif name == "optimizer":

        def without_optimizer(self: Any, saved: Any) -> None:
            fresh = self.objects["optimizer"].state_dict()
            original(self, saved)
            self.objects["optimizer"].load_state_dict(fresh)

        state.TrainState.load_state_dict = without_optimizer
    elif name == "position":

        def without_position(self: Any, saved: Any) -> None:
            original(self, saved)
            self.step_in_epoch = 0

        state.TrainState.load_state_dict = without_position
    elif name == "history":

        def without_history(self: Any, saved: Any) -> None:
            original(self, saved)
            self.history.clear()

        state.TrainState.load_state_dict = without_history
    elif name:
        raise ValueError(f"unknown sabotage {name!r}")


def content(path: Path) -> str | None:
    """A hash of what a framework's torch file holds; None for other files.

    Its bytes also depend on which of its equal strings were one object, and after a restart these are others.
    """
    if path.suffix != ".ckpt":
        return None
    import torch

    from common import weights_digest

    def plain(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return weights_digest({"": value})
        if isinstance(value, dict):
            return [[plain(key), plain(item)] for key, item in value.items()]
        if isinstance(value, (list, tuple)):
            return [type(value).__name__, *map(plain, value)]
        return repr(value)

    tree = plain(torch.load(path, weights_only=True))
    return hashlib.sha256(json.dumps(tree).encode()).hexdigest()


def attempt(module: Any, options: dict[str, Any], directory: Path, faults: str, broken: str) -> None:
    """One attempt of a training, in a child process of its own."""
    os.environ["FAULTS"] = faults
    sabotage(broken)
    from common import CheckpointManager

    keep_best = options.get("keep_best")
    with CheckpointManager(
        directory / "checkpoints",
        save_every=options.get("save_every"),
        keep_best=tuple(keep_best) if keep_best else None,
    ) as checkpoints:
        if hasattr(module, "generate"):
            result = module.generate(module.GenerateConfig(**options["config"]), checkpoints)
            digest = result.outputs_digest
        else:
            result = module.train(module.TrainConfig(**options["config"]), checkpoints)
            digest = result.weights_digest
    from common.manifest import Manifest

    saved = Path(checkpoints.latest)
    latest = Manifest.read(saved)
    answer = {
        "weights_digest": digest,
        "history": result.history,
        "resumed_from": checkpoints.resumed_from,
        "state": {name: content(saved / name) or info.xxh3_128 for name, info in latest.files.items()},
        "step": latest.step,
    }
    (directory / "result.json").write_text(json.dumps(answer))
    (directory / "modules.json").write_text(json.dumps(sorted(sys.modules)))


def run(module: Any, options: dict[str, Any], scenario: dict[str, Any]) -> dict[str, Any]:
    """All attempts of a scenario, one after the other, in one directory."""
    directory = Path(tempfile.mkdtemp(dir=Path.cwd()))
    exits, log = [], directory / "log"
    # what the imports have made stays for good: a child that collects garbage need not look through it
    gc.collect()
    gc.freeze()
    for faults in scenario["attempts"]:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(fd, 1)
                os.dup2(fd, 2)
                attempt(module, options, directory, faults, scenario["sabotage"])
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        exits.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    if (directory / "modules.json").exists():  # what a training imports late is imported here, once for the rest
        preforked.do_imports(sorted(set(json.loads((directory / "modules.json").read_text())) - set(sys.modules)))
    result = directory / "result.json"
    return {
        "exits": exits,
        "result": json.loads(result.read_text()) if result.exists() else None,
        "output": log.read_text(),
    }


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the imports print must not mix with the answers
    request = json.loads(sys.stdin.readline())
    sys.path.insert(0, request["example"])
    module = importlib.import_module("generate" if Path(request["example"], "generate.py").exists() else "train")
    for line in sys.stdin:
        print(json.dumps(run(module, request["train"], json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
