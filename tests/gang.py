"""Gangs of ranks of cifar_distributed/train.py, forked from one process that has imported it, as torchrun would start
them. Like zygote.py: the parent only imports.

A line of standard input is a scenario, ``{"attempts": [{"ranks": 2, "faults": ""}, ...], "config": {...}}``, and is
answered by a line. With ``"node": 2`` every two ranks are a node, which dies as a whole.
"""

import contextlib
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import preforked

REPO = Path(__file__).resolve().parent.parent


class Gangs:
    """The other side: runs scenarios and returns their answers."""

    def __init__(self) -> None:
        self._scratch = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self._parent = subprocess.Popen(
            [preforked.python_of(REPO / "cifar_distributed" / "flow.py"), __file__],
            cwd=self._scratch.name,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._straight: dict[str, dict[str, Any]] = {}
        self.run({"ranks": 1, "faults": ""}, config={"epochs": 1})  # lets the parent import what is imported late

    def run(self, *attempts: dict[str, Any], config: dict[str, Any] | None = None, **scenario: Any) -> dict[str, Any]:
        """``{"exits": [[...], ...], "seconds": [...], "result": ..., "output": str, "ids": [...]}``."""
        self._parent.stdin.write(json.dumps({"attempts": attempts, "config": config or {}, **scenario}) + "\n")
        self._parent.stdin.flush()
        answer = self._parent.stdout.readline()
        assert answer, "the parent of the gangs died, see standard error"
        return json.loads(answer)

    def straight(self, ranks: int, **config: Any) -> dict[str, Any]:
        """The uninterrupted training, once."""
        key = json.dumps([ranks, config])
        if key not in self._straight:
            answer = self.run({"ranks": ranks, "faults": ""}, config=config)
            assert answer["result"], answer["output"][-3000:]
            self._straight[key] = answer
        return self._straight[key]

    def close(self) -> None:
        self._parent.stdin.close()
        self._parent.wait()
        self._scratch.cleanup()


def note_indices(module: Any, path: Path) -> None:
    """Write down which samples a rank trains on."""
    original = module.AugmentedImages.__getitem__
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def getitem(self: Any, index: int) -> Any:
        os.write(file, f"{self.epoch} {index}\n".encode())
        return original(self, index)

    module.AugmentedImages.__getitem__ = getitem


def sabotage(name: str) -> None:
    """Take one protection away. Only called in a child."""
    import torch
    from torch.nn.parallel import DistributedDataParallel

    from common import distributed

    if name == "other ranks' random states":
        original = distributed._gather
        distributed._gather = lambda tree: original(tree)[:1] * distributed.world_size()
    elif name == "first backward pass":
        forward, calls = DistributedDataParallel.forward, []

        def skip_first(self: Any, images: Any) -> Any:
            calls.append(1)
            return torch.zeros(1, requires_grad=True) if len(calls) == 1 else forward(self, images)

        DistributedDataParallel.forward = skip_first
    elif name:
        raise ValueError(f"unknown sabotage {name!r}")


def be_rank(module: Any, rank: int, attempt: dict[str, Any], scenario: dict[str, Any], directory: Path) -> None:
    from common import distributed, faults
    from common.manifest import Manifest

    os.environ["FAULTS"] = attempt["faults"]
    per_node = scenario.get("node", 1)
    if per_node > 1:
        os.setpgid(0, scenario["leaders"][-1] if rank % per_node else 0)
        strike = faults.strike
        distributed.strike = lambda action: os.killpg(0, signal.SIGKILL) if action == "kill" else strike(action)
    sabotage(scenario.get("sabotage", ""))
    note_indices(module, directory / f"ids-{scenario['number']}-{rank}")
    timeout = scenario.get("timeout", 60.0)
    module.join_gang(timeout)
    keep = {"save_every": 2, "keep_best": ("val_loss", "min")} | scenario.get("keep", {})
    with distributed.DistributedCheckpointManager(directory / "checkpoints", timeout=timeout, **keep) as checkpoints:
        config = {"epochs": 2, "batch_size": 360, "backgrounds": 1, "width": 4, "dropout": 0.2} | scenario["config"]
        result = module.train(module.TrainConfig(**config), checkpoints)
        module.dist.barrier()
    if rank == 0:
        latest = Manifest.read(Path(checkpoints.latest))
        answer = {
            "weights_digest": result.weights_digest,
            "history": result.history,
            "resumed_from": checkpoints.resumed_from,
            "state": {name: info.xxh3_128 for name, info in latest.files.items()},
            "model": str(directory / "model.safetensors"),
        }
        (directory / "model.safetensors").write_bytes((result.path / "model.safetensors").read_bytes())
        (directory / "result.json").write_text(json.dumps(answer))
        (directory / "modules.json").write_text(json.dumps(sorted(sys.modules)))


def run(module: Any, scenario: dict[str, Any]) -> dict[str, Any]:
    directory = Path(tempfile.mkdtemp(dir=Path.cwd()))
    exits, seconds, log = [], [], directory / "log"
    for number, attempt in enumerate(scenario["attempts"]):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        began, pids, scenario["leaders"], scenario["number"] = time.monotonic(), [], [], number
        for rank in range(attempt["ranks"]):
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                    os.dup2(fd, 1)
                    os.dup2(fd, 2)
                    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(attempt["ranks"]))
                    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
                    be_rank(module, rank, attempt, scenario, directory)
                    code = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(code)
            pids.append(pid)
            if rank % scenario.get("node", 1) == 0:
                scenario["leaders"].append(pid)
                with contextlib.suppress(OSError):
                    if scenario.get("node", 1) > 1:
                        os.setpgid(pid, pid)  # here, too: the next rank joins it
        exits.append([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids])
        seconds.append(time.monotonic() - began)
    if (directory / "modules.json").exists():  # what a training imports late is imported here, once for the rest
        preforked.do_imports(sorted(set(json.loads((directory / "modules.json").read_text())) - set(sys.modules)))
    ids = [
        [(directory / f"ids-{number}-{rank}").read_text().split("\n")[:-1] for rank in range(attempt["ranks"])]
        for number, attempt in enumerate(scenario["attempts"])
    ]
    result = directory / "result.json"
    return {
        "exits": exits,
        "seconds": seconds,
        "result": json.loads(result.read_text()) if result.exists() else None,
        "output": log.read_text(),
        "ids": ids,
    }


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.path.insert(0, str(REPO / "cifar_distributed"))
    module = importlib.import_module("train")
    load_data, known = module.load_data, {}
    for line in sys.stdin:
        scenario = json.loads(line)
        backgrounds = scenario["config"].get("backgrounds", 1)
        if backgrounds not in known:  # numpy's work, not torch's: done once
            known[backgrounds] = load_data(module.TrainConfig(backgrounds=backgrounds))
        module.load_data = lambda config: known[config.backgrounds]
        print(json.dumps(run(module, scenario)), file=answers, flush=True)


if __name__ == "__main__":
    main()
