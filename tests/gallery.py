"""Finding the examples and running them the way a user does."""

import base64
import functools
import glob
import json
import os
import re
import shlex
import subprocess
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import preforked

REPO = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Example:
    """A directory with an example.toml."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @functools.cached_property
    def toml(self) -> dict[str, Any]:
        return tomllib.loads((self.path / "example.toml").read_text())

    @property
    def has_own_environment(self) -> bool:
        """Whether it needs other versions than the rest, so that only ``--example`` tests it."""
        return (self.path / "constraints.txt").exists()

    @property
    def smoke(self) -> list[str]:
        return shlex.split(self.toml["smoke"])

    @functools.cached_property
    def flow_name(self) -> str:
        return re.search(r"^class (\w+)\(FlowSpec\)", (self.path / "flow.py").read_text(), re.MULTILINE)[1]

    @functools.cached_property
    def readme_commands(self) -> list[str]:
        """The commands of the README's ```bash blocks, without comments and continuations."""
        blocks = re.findall(r"```bash\n(.*?)```", (self.path / "README.md").read_text(), re.DOTALL)
        lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
        return [line.split("  #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


def below(root: Path, pattern: str) -> list[Path]:
    """What ``root.rglob(pattern)`` finds, also while others delete directories, where that fails before Python 3.13."""
    found = glob.glob(f"**/{pattern}", root_dir=root, recursive=True, include_hidden=True)
    return [root / name for name in sorted(found)]


def discover() -> list[Example]:
    """Every example in the repository; a new directory is under test by existing."""
    return [Example(path.parent) for path in sorted(REPO.glob("*/example.toml"))]


@dataclass
class FlowRun:
    """A finished run of a flow."""

    returncode: int
    output: str
    flow_name: str
    run_id: str
    cwd: Path

    @functools.cached_property
    def data(self) -> Any:
        """The artifacts of the end step."""
        from metaflow import Run, namespace

        namespace(None)
        return Run(f"{self.flow_name}/{self.run_id}")["end"].task.data

    def events(self, step: str = "train") -> list[dict[str, Any]]:
        """The events of all attempts of a step's tasks, in order; of all steps with ``"*"``."""
        root = Path(os.environ["METAFLOW_DATASTORE_SYSROOT_LOCAL"], ".metaflow/mf.checkpoints/events")
        logs = sorted((root / self.flow_name / self.run_id).glob(f"{step}/*/*.jsonl"))
        return [{"attempt": int(log.stem), **json.loads(line)} for log in logs for line in log.read_text().splitlines()]

    def cards(self, step: str, name: str = "*") -> list[Path]:
        """The cards of a step, of all its tasks and attempts."""
        root = Path(os.environ["METAFLOW_DATASTORE_SYSROOT_LOCAL"])
        return below(root, f"{self.run_id}/steps/{step}/**/{name}.html")

    def card_data(self, step: str, name: str = "*") -> str:
        """What these cards show, as the text of their data."""
        found = [re.findall(r'__MF_DATA__\[[^]]*\] = "([^"]+)"', card.read_text()) for card in self.cards(step, name)]
        return "".join(base64.b64decode(data).decode() for page in found for data in page)

    def fired(self) -> list[str]:
        """The faults that fired, in order, in all tasks."""
        faults = [event for event in self.events("*") if event["event"] == "fault"]
        return [event["fault"] for event in sorted(faults, key=lambda event: event["time"])]

    @property
    def digest(self) -> str:
        """Of the weights that were trained, or of what was generated."""
        return self.data.weights_digest if "weights_digest" in self.data else self.data.outputs_digest


def run_flow(
    example: Example,
    *arguments: str,
    top: tuple[str, ...] = (),
    faults: str = "",
    command: str = "run",
    file: str = "flow.py",
    flow_name: str | None = None,
    env: dict[str, str] | None = None,
    check: bool = True,
    timeout: float = 900,
    python: str | None = None,
) -> FlowRun:
    """``python flow.py TOP run ARGUMENTS`` in an empty directory, as a user would run it.

    ``python`` is one that has done the imports already, unless another is given; see preforked.py.
    """
    cwd = Path(tempfile.mkdtemp(dir=os.environ["METAFLOW_DATASTORE_SYSROOT_LOCAL"], prefix="cwd-"))
    environment = {**os.environ, "FAULTS": faults, **(env or {})}
    python = python or preforked.python_of(example.path / file, environment)
    line = [python, str(example.path / file), *top, command, "--run-id-file", "run_id", *arguments]
    done = subprocess.run(
        line, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout
    )
    run_id = (cwd / "run_id").read_text().strip() if (cwd / "run_id").exists() else ""
    if check and done.returncode:
        raise AssertionError(f"{shlex.join(line)} ended with {done.returncode}\n{done.stdout[-6000:]}")
    return FlowRun(done.returncode, done.stdout, flow_name or example.flow_name, run_id, cwd)


@dataclass
class Scenario:
    """One training in one directory: the FAULTS of each attempt, in order; the last attempt is expected to finish.

    ``sabotage`` names a protection that zygote.py takes away first, for negative controls.
    """

    name: str
    attempts: list[str]
    sabotage: str = ""


class Trainings:
    """Runs scenarios of one example's train.py. All of them are forked from one process that imported it."""

    def __init__(self, example: Example) -> None:
        self.example = example
        self._done: dict[str, dict[str, Any]] = {}
        self._zygote: subprocess.Popen[str] | None = None

    def run(self, *scenarios: Scenario) -> list[dict[str, Any]]:
        """Results in order: ``{"exits": [...], "result": {...} or None, "output": str}``. Each scenario runs once."""
        if self._zygote is None:
            self._scratch = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
            self._zygote = subprocess.Popen(
                [preforked.python_of(self.example.path / "flow.py"), str(REPO / "tests" / "zygote.py")],
                cwd=self._scratch.name,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            self._tell({"example": str(self.example.path), "train": self.example.toml["train"]})
            # thrown away: it lets the parent import what a training imports late, before the others are forked
            self.run(Scenario("warm-up", [""]))
        for scenario in scenarios:
            if scenario.name not in self._done:
                self._tell(vars(scenario))
                answer = self._zygote.stdout.readline()
                assert answer, f"{self.example.name}: train.py could not be imported, see standard error"
                self._done[scenario.name] = json.loads(answer)
        return [self._done[scenario.name] for scenario in scenarios]

    def _tell(self, line: dict[str, Any]) -> None:
        self._zygote.stdin.write(json.dumps(line) + "\n")
        self._zygote.stdin.flush()

    def close(self) -> None:
        """End the process."""
        if self._zygote is not None:
            self._zygote.stdin.close()
            self._zygote.wait()
            self._scratch.cleanup()

    @property
    def straight(self) -> dict[str, Any]:
        """The result of the uninterrupted training."""
        answer = self.run(Scenario("straight", [""]))[0]
        assert answer["result"], f"{self.example.name}: the uninterrupted training failed\n{answer['output'][-3000:]}"
        return answer["result"]
