"""A tumour classifier in XGBoost, as a Metaflow flow that survives any kill, and its model in the registry.

python xgboost/flow.py run
python xgboost/flow.py run --rounds 2500 --patience 0 --with timeout:seconds=15      # interrupted again and again
"""

from metaflow import FlowSpec, Parameter, card, checkpoint, current, model, resources, retry, step

import common  # at the top on purpose: this is how Metaflow knows to package it for remote tasks


class XGBoostFlow(FlowSpec):
    style = Parameter("style", default="native", help="native (xgboost.train) or sklearn (XGBClassifier)")
    booster = Parameter("booster", default="gbtree", help="gbtree or dart")
    rounds = Parameter("rounds", default=100, help="boosting rounds, at most")
    patience = Parameter("patience", default=50, help="rounds without a lower validation loss; 0: never stop early")
    learning_rate = Parameter("learning-rate", default=0.2, help="shrinkage of each tree")
    segment = Parameter("segment", default=10, help="rounds in a segment; checkpoints fall on its multiples")
    threads = Parameter("threads", default=1, help="of XGBoost; more pay off from some ten thousand rows on")
    save_every = Parameter("save-every", default="10", help="rounds (20), time (10m) or both (500,10m)")
    resume_from = Parameter("resume-from", default="", help="continue another run: RUN or RUN@STEP")
    allow_changes = Parameter("allow-changes", default=False, help="continue although the configuration differs")
    exact = Parameter("exact", default=False, help="refuse to resume with other library versions or devices")

    @step
    def start(self):
        from dataclasses import asdict

        from train import TrainConfig

        # bad parameters are refused here, before anything is written and without retries
        self.config = asdict(
            TrainConfig(
                style=self.style,
                booster=self.booster,
                rounds=self.rounds,
                patience=self.patience,
                learning_rate=self.learning_rate,
                segment=self.segment,
                threads=self.threads,
            )
        )
        self.next(self.train)

    @card(type="blank", id="training")  # how it went, and what it cost; refreshed while it trains
    @resources(cpu=2, memory=4000)
    @retry(times=4, minutes_between_retries=0)
    @model
    @checkpoint(load_policy="none", show_card=False)  # the manager restores, and deletes what is not kept
    @step
    def train(self):
        from train import TrainConfig, train

        with common.CheckpointManager(
            current.checkpoint,
            save_every=self.save_every,
            keep_last=2,
            resume_from=self.resume_from,
            allow_changes=self.allow_changes,
            exact=self.exact,
            card=current.card["training"],
        ) as checkpoints:
            result = train(TrainConfig(**self.config), checkpoints)

        self.history, self.weights_digest = result.history, result.weights_digest
        self.resumed_from = checkpoints.resumed_from
        self.latest_checkpoint = checkpoints.latest  # a reference that Metaflow's own API loads, too
        self.classifier = current.model.save(
            str(result.path),
            label="breast_cancer",
            metadata={"rounds": result.rounds, "digest": result.weights_digest, "config": self.config},
        )
        self.next(self.evaluate)

    @card(type="blank")
    @retry(times=4, minutes_between_retries=0)
    @model(load="classifier")  # by the artifact's name
    @step
    def evaluate(self):
        from metaflow.cards import Markdown
        from train import load, validation_auc

        booster = load(current.model.loaded["classifier"])
        info = current.model.loaded.info["classifier"]  # what the registry knows: key, label, size, metadata
        self.model_key, self.auc = info["key"], validation_auc(booster)
        losses = {name: name.removesuffix("_logloss") for name in self.history[0] if name.endswith("_logloss")}
        current.card.append(Markdown(f"# Validation AUC {self.auc:.4f} with {info['metadata']['rounds']} rounds"))
        current.card.append(common.report.curves(self.history, losses, "log loss", mark=info["metadata"]["rounds"]))
        current.card.append(common.report.bars(booster.get_score(importance_type="gain"), "Feature importance (gain)"))
        print(f"validation AUC {self.auc:.4f} with {info['metadata']['rounds']} rounds")
        print(f"model key {self.model_key}")
        self.next(self.end)

    @step
    def end(self):
        resumed = f", resumed at round {', '.join(map(str, self.resumed_from))}" if self.resumed_from else ""
        print(f"{self.history[-1]['step']} rounds{resumed}; model {self.weights_digest[:16]}")


if __name__ == "__main__":
    XGBoostFlow()
