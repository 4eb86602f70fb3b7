"""The promise, for every directory that has an example.toml: kill it anywhere, it ends as if nothing had happened."""

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from gallery import Example, FlowRun, Scenario, Trainings, run_flow
from preforked import python_of

KILLED = -signal.SIGKILL


def needs_train(example: Example) -> None:
    if "train" not in example.toml:
        pytest.skip(f"{example.name}/example.toml has no [train] section: it has tests of its own instead")


def edges(history: list[dict]) -> list[int]:
    """The steps at which an epoch ended."""
    return sorted({record["step"] for record in history if "epoch" in record})


def assert_same(straight: dict, answer: dict, what: str) -> None:
    assert answer["result"] is not None, f"{what}: did not finish\n{answer['output'][-3000:]}"
    for key in ("weights_digest", "history", "step", "state"):
        assert answer["result"][key] == straight[key], f"{what}: {key} differs from the uninterrupted run's"


# -------------------------------------------------------------------- train.py


def test_killed_at_every_step(example: Example, trainings: Trainings) -> None:
    needs_train(example)
    straight = trainings.straight
    steps = range(1, straight["step"] + 1)
    answers = trainings.run(*[Scenario(f"step {n}", [f"kill@step={n}", ""]) for n in steps])
    for n, answer in zip(steps, answers, strict=True):
        assert answer["exits"] == [KILLED, 0], f"step {n}: {answer['exits']}\n{answer['output'][-3000:]}"
        assert_same(straight, answer, f"killed at step {n}")
    resumed = {tuple(answer["result"]["resumed_from"]) for answer in answers}
    assert len(resumed) > 2, f"the kills never made it resume from different steps: {resumed}"


def test_killed_again_and_again(example: Example, trainings: Trainings) -> None:
    """Three times in one epoch, on its edge, in the middle of writing, and started again after the end."""
    needs_train(example)
    straight = trainings.straight
    first_edge = edges(straight["history"])[0] if edges(straight["history"]) else straight["step"] // 2
    in_epoch = [f"kill@step={n}" for n in range(max(1, first_edge - 3), first_edge)]
    last = straight["step"]
    scenarios = [
        Scenario("thrice", [*in_epoch, f"kill@step={first_edge}", f"kill@step={last}", ""]),
        Scenario("mid-save", ["kill@save=1", "kill@save=2", "kill@save=1,attempt=2", ""]),
        Scenario("after the end", ["", ""]),
    ]
    answers = trainings.run(*scenarios)
    for scenario, answer in zip(scenarios, answers, strict=True):
        dead = len(scenario.attempts) - 1 if scenario.name != "after the end" else 0
        assert answer["exits"] == [KILLED] * dead + [0] * (len(scenario.attempts) - dead), answer["output"][-3000:]
        assert_same(straight, answer, scenario.name)
    assert "all steps are done" in answers[-1]["output"], "the second start after the end did not say so"


def test_asked_to_stop(example: Example, trainings: Trainings) -> None:
    """SIGTERM: the step in hand is saved, nothing is trained twice, the process ends with an error."""
    needs_train(example)
    straight = trainings.straight
    n = straight["step"] // 2
    (answer,) = trainings.run(Scenario("term", [f"term@step={n}", ""]))
    assert answer["exits"] == [1, 0], answer["output"][-3000:]
    assert answer["result"]["resumed_from"] == [n]
    assert_same(straight, answer, "SIGTERM")


def test_train_runs_without_metaflow(example: Example, tmp_path: Path) -> None:
    """``python train.py`` in a world where metaflow cannot be imported. A second start, anywhere, has nothing to do."""
    script = example.path / ("generate.py" if (example.path / "generate.py").exists() else "train.py")
    (tmp_path / "block" / "metaflow").mkdir(parents=True)
    (tmp_path / "block" / "metaflow" / "__init__.py").write_text("raise ImportError('metaflow is out of reach')\n")
    for python, path, expected in (
        (sys.executable, str(tmp_path / "block"), "starts at step 0"),
        (python_of(script), "", "all steps are done, --fresh starts anew"),
    ):
        env = {**os.environ, **({"PYTHONPATH": path} if path else {})}
        done = subprocess.run([python, script], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert expected in done.stdout, done.stdout[-3000:]


# -------------------------------------------------------------------- flow.py


def test_flow_has_the_common_artifacts(example: Example, straight_run: FlowRun) -> None:
    data, digest = straight_run.data, straight_run.digest
    assert len(digest) == 64 and int(digest, 16)
    assert data.resumed_from == []
    assert data.history and all("step" in record for record in data.history)
    assert not any("time" in key for record in data.history for key in record), "clock times in the history"
    assert data.latest_checkpoint


def test_flow_dies_in_every_way_and_ends_the_same(example: Example, straight_run: FlowRun) -> None:
    """SIGKILL mid-epoch, on the epoch edge, in mid-save, and Metaflow's own @timeout: one after the other."""
    needs_train(example)
    history = straight_run.data.history
    total, ends = history[-1]["step"], edges(history)
    edge = ends[len(ends) // 2] if ends else total // 2
    early = max(2, (ends[0] if ends else total // 3) // 2)
    late = min(total, edge + max(2, (total - edge) // 2))
    # in a flow whose steps are spread over several tasks the example says which fault hits which
    faults = example.toml["train"].get("flow_faults") or [
        f"kill@step={early},attempt=0",
        f"kill@step={edge},attempt=1",
        "kill@save=1,attempt=2",
        f"alarm@step={late},attempt=3",
    ]
    assert {fault.partition("=")[0] for fault in faults} == {"kill@step", "kill@save", "alarm@step"}
    run = run_flow(example, *example.smoke, "--with", "timeout:hours=1", faults=";".join(faults))
    assert run.fired() == faults, f"not every fault fired exactly once\n{run.output[-3000:]}"
    assert len(run.data.resumed_from) >= 2, run.output[-3000:]
    assert run.data.history == straight_run.data.history
    assert run.digest == straight_run.digest


def test_package_contains_common(example: Example) -> None:
    """A remote task finds common/: Metaflow packages it with the flow."""
    done = subprocess.run(
        [sys.executable, str(example.path / "flow.py"), "package", "list"],
        cwd=os.environ["METAFLOW_DATASTORE_SYSROOT_LOCAL"], capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    listing = done.stdout + done.stderr
    assert done.returncode == 0, listing[-3000:]
    for needed in ("common/__init__.py", "common/checkpoint.py", "common/metaflow_store.py", "train.py", "flow.py"):
        if needed != "train.py" or (example.path / "train.py").exists():
            assert needed in listing, f"{needed} would be missing remotely:\n{listing[-2000:]}"


def test_readme_commands_run(example: Example, straight_run: FlowRun) -> None:
    """The first command of the README is the straight run's; the other local ones run with the smoke arguments.

    One that only adds a kill is what :func:`test_flow_dies_in_every_way_and_ends_the_same` does, four times over.
    """
    commands = example.readme_commands
    first = f"python {example.name}/flow.py run"
    assert commands and commands[0] == first, f"the first command must be `{first}`, it is {commands[:1]}"
    ran = 0
    for command in commands[1:]:
        before, _, arguments = command.partition(f"python {example.name}/flow.py ")
        if not arguments.startswith("run") or "--with kubernetes" in command or "--with batch" in command:
            continue
        variables = dict(word.split("=", 1) for word in shlex.split(before))
        smoke = list(example.smoke)
        faults = variables.pop("FAULTS", "")
        if re.fullmatch(r"kill@step=\d+(,rank=\d+)?", faults) and arguments == "run":
            ran += 1
            continue
        if faults:  # the same fault, early enough for a tiny run
            kind, _, _ = faults.partition("=")
            faults = f"{kind}={max(2, straight_run.data.history[-1]['step'] // 2)}"
        extra = arguments.split()[1:]
        if "--resume-from" in extra:
            extra[extra.index("--resume-from") + 1] = straight_run.run_id
        if any(word in extra for word in ("--dataset", "--base-model", "--model")):
            continue  # needs a download
        run = run_flow(example, *smoke, *extra, faults=faults, env=variables)
        assert run.fired() == ([faults] if faults else [])
        ran += 1
    assert ran, "no other command of the README could be run"
