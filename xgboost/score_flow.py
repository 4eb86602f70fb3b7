"""Another flow that uses the model: it knows nothing of the training but the model's key.

python xgboost/score_flow.py run --model-key KEY      # the key that flow.py printed
"""

from metaflow import FlowSpec, Parameter, current, model, step

import common  # noqa: F401  at the top on purpose: this is how Metaflow knows to package it for remote tasks


class ScoreFlow(FlowSpec):
    model_key = Parameter("model-key", required=True, help="key of a model in the registry")

    @model(load="model_key")  # a parameter or artifact that holds a key, or what current.model.save returned
    @step
    def start(self):
        from train import load, validation_auc

        info = current.model.loaded.info["model_key"]
        self.auc = validation_auc(load(current.model.loaded["model_key"]))
        self.digest = info["metadata"]["digest"]
        print(f"{info['metadata']['rounds']} rounds, from {info['pathspec']}: validation AUC {self.auc:.4f}")
        self.next(self.end)

    @step
    def end(self):
        pass


if __name__ == "__main__":
    ScoreFlow()
