"""What is special about XGBoost: segments, early stopping, the registry, and the documentation's story of @timeout."""

import hashlib
import importlib.util
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gallery import REPO, Example, FlowRun, Scenario, Trainings, run_flow

pytest.importorskip("xgboost", reason="xgboost is not installed")

import xgboost  # noqa: E402

from common import CheckpointError, CheckpointManager, ConfigChanged  # noqa: E402
from common.data import breast_cancer  # noqa: E402
from common.xgboost import CheckpointCallback, fit_in_segments, train_in_segments  # noqa: E402

pytestmark = pytest.mark.xdist_group("xgboost")

SAMPLING = {"objective": "binary:logistic", "subsample": 0.5, "colsample_bytree": 0.3, "nthread": 1}


@pytest.fixture(scope="module")
def module() -> Any:
    """The example's train.py."""
    spec = importlib.util.spec_from_file_location("xgboost_train", REPO / "xgboost" / "train.py")
    loaded = importlib.util.module_from_spec(spec)
    sys.modules["xgboost_train"] = loaded
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(scope="module")
def run() -> FlowRun:
    """The flow with its smoke arguments, left alone."""
    example = Example(REPO / "xgboost")
    return run_flow(example, *example.smoke)


@pytest.fixture
def trainings(request: pytest.FixtureRequest) -> Iterator[Trainings]:
    """Trainings with the configuration of the test's parameter over the one in example.toml."""
    example = Example(REPO / "xgboost")
    example.toml["train"]["config"].update(request.param)
    trainings = Trainings(example)
    yield trainings
    trainings.close()


@pytest.fixture(scope="module")
def matrices() -> tuple[xgboost.DMatrix, xgboost.DMatrix]:
    data = breast_cancer()
    return (
        xgboost.DMatrix(data.train_rows, data.train_labels, nthread=1),
        xgboost.DMatrix(data.val_rows, data.val_labels, nthread=1),
    )


def digest(booster: xgboost.Booster) -> str:
    return hashlib.sha256(booster.save_raw("json")).hexdigest()


def saved_steps(directory: Path) -> list[int]:
    logs = sorted((directory / "events").glob("*.jsonl"))
    events = [json.loads(line) for log in logs for line in log.read_text().splitlines()]
    return [event["step"] for event in events if event["event"] == "saved"]


def assert_killed_is_same(trainings: Trainings, steps: list[int]) -> dict[str, Any]:
    straight = trainings.straight
    answers = trainings.run(*[Scenario(f"step {n}", [f"kill@step={n}", ""]) for n in steps])
    for n, answer in zip(steps, answers, strict=True):
        assert answer["exits"] == [-9, 0], f"killed at {n}: {answer['output'][-3000:]}"
        for key in ("weights_digest", "history", "state"):
            assert answer["result"][key] == straight[key], f"killed at {n}: {key} differs"
    return straight


# -------------------------------------------------------------------- accuracy and exactness


def test_accuracy_and_both_styles_are_one(module, tmp_path):
    """0.9894 was measured."""
    digests = set()
    for style in ("native", "sklearn"):
        with CheckpointManager(tmp_path / style, save_every=10) as checkpoints:
            result = module.train(module.TrainConfig(style=style), checkpoints)
            assert module.validation_auc(module.load(result.path)) >= 0.98
        assert [record["step"] for record in result.history] == list(range(1, 101))
        digests.add(result.weights_digest)
    assert len(digests) == 1


@pytest.mark.parametrize(
    "trainings",
    [{"style": "sklearn"}, {"booster": "dart"}, {"style": "sklearn", "booster": "dart"}],
    ids=["sklearn", "dart", "sklearn-dart"],
    indirect=True,
)
def test_sampling_and_dart_continue_exactly(trainings):
    """The generic tests do the same with the native style and gbtree, at every round."""
    straight = assert_killed_is_same(trainings, [4, 6, 8, 11, 12])
    assert straight["step"] == 12


@pytest.mark.parametrize(
    "params, same",
    [
        ({**SAMPLING, "subsample": 1.0, "colsample_bytree": 1.0}, True),
        (SAMPLING, False),
        ({**SAMPLING, "subsample": 1.0, "colsample_bytree": 1.0, "booster": "dart", "rate_drop": 0.5}, False),
    ],
    ids=["no sampling", "sampling", "dart"],
)
def test_without_segments_it_differs(matrices, params, same):
    """The negative control: XGBoost's own continuation of a model."""
    straight = xgboost.train(params, matrices[0], 12)
    half = xgboost.train(params, matrices[0], 6)
    resumed = xgboost.train(params, matrices[0], 6, xgb_model=half.save_raw("ubj"))
    assert (digest(resumed) == digest(straight)) is same


def test_another_segment_length_is_another_training(module, tmp_path):
    def train(segment: int, **options):
        with CheckpointManager(tmp_path, save_every=1, **options) as checkpoints:
            return module.train(module.TrainConfig(rounds=12, patience=0, segment=segment), checkpoints)

    three = train(3)
    with pytest.raises(ConfigChanged, match="segment: 3 -> 4"):
        train(4)
    assert train(4, fresh=True).weights_digest != three.weights_digest


def test_the_callback_puts_its_own_settings_into_the_configuration(matrices, tmp_path):
    def train(rounds=4, **options):
        with CheckpointManager(tmp_path) as checkpoints:
            callback = CheckpointCallback(checkpoints, {}, **options)
            train_in_segments(SAMPLING, matrices[0], rounds, evals=[(matrices[1], "val")], callback=callback)

    train(segment=2)
    for change in ({"segment": 3}, {"rounds": 5}, {"early_stopping": ("val_logloss", "min", 3)}):
        with pytest.raises(ConfigChanged, match=next(iter(change))):
            train(**{"segment": 2, **change})


# -------------------------------------------------------------------- when it saves, and when it stops


def test_what_falls_due_inside_a_segment_is_saved_at_its_end(module, tmp_path):
    with CheckpointManager(tmp_path, save_every=4) as checkpoints:
        module.train(module.TrainConfig(rounds=14, patience=0, segment=3), checkpoints)
    assert saved_steps(tmp_path) == [6, 9, 12, 14]  # 4, 8 and 12 rounded up, and the last round


@pytest.mark.parametrize("trainings", [{}], indirect=True)
def test_asked_to_stop_inside_a_segment(trainings):
    """The segment's beginning is what can be saved; before the first boundary there is nothing to save."""
    inside, first, resumed = trainings.run(
        Scenario("inside", ["term@step=8", ""]),
        Scenario("first", ["term@step=2", ""]),
        Scenario("resumed", ["kill@step=5", "term@step=5", ""]),
    )
    assert inside["exits"] == [1, 0] and inside["result"]["resumed_from"] == [6]
    assert "stopped at step 6: SIGTERM was received" in inside["output"]
    assert first["exits"] == [1, 0] and first["result"]["resumed_from"] == []
    assert "stopped before the first checkpoint" in first["output"]
    assert resumed["exits"] == [-9, 1, 0] and resumed["result"]["resumed_from"][-1:] == [3]
    for answer in (inside, first, resumed):
        for key in ("weights_digest", "history", "state"):
            assert answer["result"][key] == trainings.straight[key]


@pytest.mark.parametrize("trainings", [{"rounds": 60, "patience": 5, "learning_rate": 0.5}], indirect=True)
def test_early_stopping_continues(trainings):
    """Patience is decided from the history, so a kill neither lengthens nor shortens it."""
    last = trainings.straight["step"]
    assert 6 < last < 60
    losses = [record["val_logloss"] for record in trainings.straight["history"]]
    assert last - (losses.index(min(losses)) + 1) == 5
    assert_killed_is_same(trainings, [last - 5, last - 2, last - 1, last])
    (again,) = trainings.run(Scenario("after the end", ["", ""]))
    assert f"early stopping ended this training at round {last}" in again["output"]
    assert again["result"]["weights_digest"] == trainings.straight["weights_digest"]


def test_without_the_history_patience_begins_anew(matrices):
    """The negative control: XGBoost's own early stopping after a resume."""
    params = {"objective": "binary:logistic", "nthread": 1, "learning_rate": 0.5}
    arguments = {"evals": [(matrices[1], "val")], "early_stopping_rounds": 5, "verbose_eval": False}
    straight = xgboost.train(params, matrices[0], 60, **arguments).num_boosted_rounds()
    half = xgboost.train(params, matrices[0], straight - 2)
    resumed = xgboost.train(params, matrices[0], 60, xgb_model=half, **arguments).num_boosted_rounds()
    assert resumed > straight


def test_the_model_is_that_of_the_best_round(matrices, tmp_path):
    with CheckpointManager(tmp_path) as checkpoints:
        callback = CheckpointCallback(checkpoints, {}, segment=3, early_stopping=("val_auc", "max", 5))
        params = {**SAMPLING, "eval_metric": "auc"}
        booster = train_in_segments(params, matrices[0], 60, evals=[(matrices[1], "val")], callback=callback)
    values = [record["val_auc"] for record in callback.history]
    assert callback.best_round == booster.num_boosted_rounds() == values.index(max(values)) + 1 < len(values)


def test_a_checkpoint_holds_the_model_in_xgboosts_own_format(module, tmp_path):
    with CheckpointManager(tmp_path, save_every=3) as checkpoints:
        module.train(module.TrainConfig(rounds=5, patience=0, segment=3), checkpoints)
        model = checkpoints.load_state(checkpoints.latest)["model"]["ubj"]
    assert xgboost.Booster(model_file=bytearray(model)).num_boosted_rounds() == 5
    files = {path.name for path in (tmp_path / "step-00000005").iterdir()}
    assert files == {"state.safetensors", "state.json", "manifest.json"}


# -------------------------------------------------------------------- what it refuses


@pytest.mark.parametrize(
    "params, arguments, options, message",
    [
        ({"booster": "gblinear"}, {}, {}, "booster is 'gblinear'"),
        ({"process_type": "update"}, {}, {}, "process_type is 'update'"),
        ({"seed": "today"}, {}, {}, "seed is 'today'"),
        ({}, {"callbacks": [xgboost.callback.LearningRateScheduler([0.1])]}, {}, "callbacks cannot be continued"),
        ({}, {"early_stopping_rounds": 5}, {}, "early_stopping_rounds cannot .* Give early_stopping="),
        ({}, {"evals_result": {}}, {}, "evals_result"),
        ({"booster": "dart"}, {}, {"early_stopping": ("val_logloss", "min", 5)}, "booster='dart'"),
        ({}, {}, {"early_stopping": ("val_logloss", "down", 5)}, "'min' or 'max'"),
        ({}, {}, {"early_stopping": ("loss", "min", 5)}, "names 'loss', but .*val_logloss"),
        ({}, {}, {"segment": 0}, "segment is 0"),
    ],
)
def test_what_cannot_be_exact_is_refused(matrices, tmp_path, params, arguments, options, message):
    with pytest.raises(CheckpointError, match=message), CheckpointManager(tmp_path) as checkpoints:
        callback = CheckpointCallback(checkpoints, {}, **options)
        arguments = {"evals": [(matrices[1], "val")], **arguments}
        train_in_segments({**SAMPLING, **params}, matrices[0], 3, callback=callback, **arguments)
    assert saved_steps(tmp_path) == []


def test_the_classifier_refuses_the_same(tmp_path):
    data = breast_cancer()
    rows, labels = data.train_rows, data.train_labels
    with CheckpointManager(tmp_path) as checkpoints:
        for option, message in (
            ({"early_stopping_rounds": 5}, "early_stopping_rounds"),
            ({"callbacks": [xgboost.callback.EarlyStopping(rounds=3)]}, "callbacks"),
            ({"booster": "gblinear"}, "gblinear"),
            ({"random_state": "today"}, "random_state is 'today'"),
        ):
            with pytest.raises(CheckpointError, match=message):
                model = xgboost.XGBClassifier(n_estimators=3, n_jobs=1, **option)
                fit_in_segments(model, rows, labels, callback=CheckpointCallback(checkpoints, {}))
        with pytest.raises(CheckpointError, match="Call train_in_segments or fit_in_segments"):
            callback = CheckpointCallback(checkpoints, {})
            xgboost.XGBClassifier(n_estimators=3, n_jobs=1, callbacks=[callback]).fit(rows, labels)


def test_several_workers_are_refused(matrices, tmp_path, monkeypatch):
    monkeypatch.setattr(xgboost.collective, "get_world_size", lambda: 2)
    with CheckpointManager(tmp_path) as checkpoints, pytest.raises(CheckpointError, match="2 workers"):
        train_in_segments(SAMPLING, matrices[0], 3, callback=CheckpointCallback(checkpoints, {}))


@pytest.mark.parametrize(
    "bad", [{"style": "r"}, {"booster": "gblinear"}, {"rounds": 0}, {"booster": "dart"}, {"patience": -1}]
)
def test_bad_configurations(module, bad):
    with pytest.raises(ValueError):
        module.TrainConfig(**bad)


# -------------------------------------------------------------------- the flow


@pytest.mark.slow  # how often it is interrupted depends on the machine; alarm@step tests @timeout exactly
def test_the_story_of_the_documentation(module, tmp_path):
    """@timeout(seconds=15) interrupts the training, @retry starts it again, and all rounds are there at the end."""
    began = time.process_time()  # not the clock's: what runs beside it now may be gone later
    with CheckpointManager(tmp_path, save_every=10) as checkpoints:
        module.train(module.TrainConfig(rounds=1000, patience=0), checkpoints)
    # it grows with less than the square of the rounds: these take 35 to 40 seconds, and each of five attempts has 12
    rounds = round(1000 * (60 / (time.process_time() - began)) ** 0.5)
    run = run_flow(
        Example(REPO / "xgboost"), "--rounds", str(rounds), "--patience", "0", "--with", "timeout:seconds=15"
    )
    ends = [event.get("message", "") for event in run.events() if event["event"] == "ended"]
    assert len(ends) >= 3 and all("@timeout" in message for message in ends[:-1]), run.output[-3000:]
    assert len(run.data.resumed_from) >= 2 and sorted(set(run.data.resumed_from)) == run.data.resumed_from
    assert [record["step"] for record in run.data.history] == list(range(1, rounds + 1))


def test_the_model_by_its_key_from_another_flow(run):
    key = run.data.model_key
    assert "/breast_cancer_" in key, "the label is not in the key"
    scored = run_flow(Example(REPO / "xgboost"), "--model-key", key, file="score_flow.py", flow_name="ScoreFlow")
    assert scored.data.auc == run.data.auc and scored.data.digest == run.data.weights_digest


def test_the_model_in_a_plain_script(run, tmp_path):
    """The README's own script."""
    readme = (REPO / "xgboost" / "README.md").read_text()
    (script,) = re.findall(r"```python\n(.*?from metaflow import .*?)```", readme, re.DOTALL)
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert f"{run.data.history[-1]['step']} rounds" in done.stdout
    booster = xgboost.Booster(model_file=tmp_path / "model" / "model.ubj")
    assert digest(booster) == run.data.weights_digest


def test_the_card(run):
    data = run.card_data("evaluate")
    for expected in ("Validation AUC", "log loss", "Feature importance", "worst perimeter"):
        assert expected in data
