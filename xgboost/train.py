"""Train a tumour classifier with XGBoost. Kill it whenever you like: it ends as if nothing had happened.

python train.py                      # checkpoints go to checkpoints/; run it again after a kill
python train.py --fresh              # forget them and start anew
"""

import hashlib
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import xgboost
from sklearn.metrics import roc_auc_score

from common import CheckpointManager, seed_everything
from common.data import breast_cancer
from common.xgboost import CheckpointCallback, fit_in_segments, train_in_segments


@dataclass(frozen=True)
class TrainConfig:
    """Everything that the result depends on; a checkpoint made under another configuration is refused."""

    style: str = "native"  # or "sklearn": the same training through XGBClassifier
    booster: str = "gbtree"  # or "dart"
    rounds: int = 100
    patience: int = 50  # rounds without a lower validation loss before training stops; 0: never
    segment: int = 10  # rounds between the points from which a training can be continued exactly
    learning_rate: float = 0.2
    max_depth: int = 3
    subsample: float = 0.5
    colsample_bytree: float = 0.3
    rate_drop: float = 0.1  # of DART
    threads: int = 1  # more pay off from some ten thousand rows on
    seed: int = 0

    def __post_init__(self):
        if self.style not in ("native", "sklearn"):
            raise ValueError(f"style is {self.style!r}: choose native (xgboost.train) or sklearn (XGBClassifier)")
        if self.booster not in ("gbtree", "dart"):
            raise ValueError(f"booster is {self.booster!r}: choose gbtree or dart")
        if min(self.rounds, self.segment, self.threads) < 1 or self.patience < 0:
            raise ValueError(
                f"rounds, segment and threads must be 1 or more and patience 0 or more, not "
                f"{self.rounds}, {self.segment}, {self.threads} and {self.patience}"
            )
        if self.booster == "dart" and self.patience:
            raise ValueError("DART changes earlier trees, so there is no best round to go back to: set patience to 0")


@dataclass(frozen=True)
class TrainResult:
    path: Path  # a directory with model.ubj: the model of the best round, by validation loss; of all with patience 0
    history: list
    weights_digest: str
    rounds: int  # in the model


def train_native(config: TrainConfig, params: dict, data, callback: CheckpointCallback) -> xgboost.Booster:
    dtrain = xgboost.DMatrix(data.train_rows, data.train_labels, nthread=config.threads)
    dval = xgboost.DMatrix(data.val_rows, data.val_labels, nthread=config.threads)
    params = {**params, "nthread": config.threads, "seed": config.seed}
    return train_in_segments(
        params, dtrain, config.rounds, evals=[(dtrain, "train"), (dval, "val")], callback=callback
    )  # fmt: skip


def train_sklearn(config: TrainConfig, params: dict, data, callback: CheckpointCallback) -> xgboost.Booster:
    model = xgboost.XGBClassifier(
        n_estimators=config.rounds, n_jobs=config.threads, random_state=config.seed, **params
    )  # fmt: skip
    sets = [(data.train_rows, data.train_labels), (data.val_rows, data.val_labels)]
    return fit_in_segments(model, data.train_rows, data.train_labels, eval_set=sets, callback=callback).get_booster()


def print_progress(record: dict) -> None:
    values = [f"{name} {value:.4f}" for name, value in record.items() if name != "step"]
    print(f"round {record['step']:4}  " + "  ".join(values), flush=True)


def train(config: TrainConfig, checkpoints: CheckpointManager) -> TrainResult:
    seed_everything(config.seed)
    data = breast_cancer()
    params = {
        "objective": "binary:logistic",
        "eval_metric": ["auc", "logloss"],
        "booster": config.booster,
        "learning_rate": config.learning_rate,
        "max_depth": config.max_depth,
        "subsample": config.subsample,
        "colsample_bytree": config.colsample_bytree,
    }
    if config.booster == "dart":
        params["rate_drop"] = config.rate_drop

    # XGBClassifier numbers its evaluation sets
    metric = "val_logloss" if config.style == "native" else "validation_1_logloss"
    callback = CheckpointCallback(
        checkpoints,
        {**asdict(config), "data": data.fingerprint},
        segment=config.segment,
        early_stopping=(metric, "min", config.patience) if config.patience else None,
        report=print_progress,
    )
    booster = (train_native if config.style == "native" else train_sklearn)(config, params, data, callback)
    booster.feature_names = data.feature_names
    booster.save_model(checkpoints.directory / "model.ubj")
    digest = hashlib.sha256(booster.save_raw("json")).hexdigest()
    return TrainResult(checkpoints.directory, callback.history, digest, booster.num_boosted_rounds())


def load(model_path: str) -> xgboost.Booster:
    return xgboost.Booster(model_file=Path(model_path) / "model.ubj")


def validation_auc(booster: xgboost.Booster) -> float:
    data = breast_cancer()
    rows = xgboost.DMatrix(data.val_rows, feature_names=data.feature_names)
    return float(roc_auc_score(data.val_labels, booster.predict(rows)))


if __name__ == "__main__":
    with CheckpointManager(save_every=10, fresh="--fresh" in sys.argv) as checkpoints:
        result = train(TrainConfig(), checkpoints)
        auc = validation_auc(load(result.path))
    print(f"{result.rounds} rounds in the model, validation AUC {auc:.4f}, model {result.weights_digest[:16]}")
