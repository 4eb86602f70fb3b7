"""LLaMA-Factory as a Metaflow flow that survives any kill: a small grid of LoRA ranks, the best one merged.

python llama_factory/flow.py run
FAULTS=kill@step=30 python llama_factory/flow.py run      # see each training die and come back
"""

from metaflow import FlowSpec, Parameter, card, checkpoint, current, huggingface_hub, model, resources, retry, step

import common  # at the top on purpose: this is how Metaflow knows to package it for remote tasks


class LlamaFactoryFlow(FlowSpec):
    config = Parameter("config", default="train.yaml", help="LLaMA-Factory's YAML file, beside flow.py or a whole path")
    overrides = Parameter("overrides", default="", help="what replaces some of it: 'max_steps=20 learning_rate=1.0e-3'")
    ranks = Parameter("ranks", default="4,8", help="one training for each lora_rank; empty: one, with the file's")
    question = Parameter("question", default="Which day follows Monday?", help="to ask the tuned model")
    save_every = Parameter("save-every", default="1", help="of the checkpoints made: each (1), 10m, or both (500,10m)")
    resume_from = Parameter("resume-from", default="", help="continue another run: RUN or RUN@STEP")
    allow_changes = Parameter("allow-changes", default=False, help="continue although the configuration differs")
    exact = Parameter("exact", default=False, help="refuse to resume with other library versions or devices")

    @huggingface_hub(cache_scope="global")
    @step
    def start(self):
        from dataclasses import asdict

        from train import MODEL_FILES, TrainConfig, parse_overrides

        ranks = [int(rank) for rank in self.ranks.split(",") if rank]
        grid = [{"lora_rank": rank} for rank in ranks] or [{}]
        wanted = parse_overrides(self.overrides)
        config = TrainConfig(self.config, wanted)  # bad ones are refused here, before anything is written
        config.check_ranks(ranks)
        self.chat = config.for_chat()
        name, revision = config.arguments["model_name_or_path"], config.arguments.get("model_revision", "main")
        self.commit = common.hub.resolve(name, revision)  # recorded, and used by every retry
        with common.hub.clear_errors(name, self.commit):
            self.base_model = current.huggingface_hub.snapshot_download(
                repo_id=name, revision=self.commit, allow_patterns=MODEL_FILES, endpoint=common.hub.endpoint(name)
            )
        self.configs = [asdict(TrainConfig(self.config, {**wanted, **point}, self.commit)) for point in grid]
        self.trials = list(range(len(self.configs)))
        self.next(self.train, foreach="trials")

    @card(type="blank", id="training")  # loss, learning rate and progress; refreshed while it trains
    @resources(cpu=2, memory=8000)
    @retry(times=4, minutes_between_retries=0)
    @model(load=["base_model"])
    @checkpoint(load_policy="none", show_card=False)  # the manager restores, and deletes what is not kept
    @step
    def train(self):
        from train import TrainConfig, train

        base_model = common.hub.private_copy(current.model.loaded["base_model"], self.commit)
        with common.CheckpointManager(
            current.checkpoint,
            save_every=self.save_every,
            resume_from=self.resume_from,
            allow_changes=self.allow_changes,
            exact=self.exact,
            card=current.card["training"],
        ) as checkpoints:
            result = train(TrainConfig(**self.configs[self.input]), checkpoints, base_model)

        self.rank = self.configs[self.input]["overrides"].get("lora_rank", "of the file")
        self.history, self.weights_digest = result.history, result.weights_digest
        self.resumed_from = checkpoints.resumed_from
        self.latest_checkpoint = checkpoints.latest  # a reference that Metaflow's own API loads, too
        self.adapter = current.model.save(str(result.path), label="llama_factory_adapter")
        self.next(self.choose)

    @retry(times=4, minutes_between_retries=0)
    @step
    def choose(self, inputs):
        from hashlib import sha256
        from math import inf

        def loss_of(trial) -> float:
            """The last one; inf without an evaluation, and for a training that has diverged to NaN."""
            losses = [record["eval_loss"] for record in trial.history if "eval_loss" in record]
            return losses[-1] if losses and losses[-1] == losses[-1] else inf

        losses = list(map(loss_of, inputs))
        for trial, loss in zip(inputs, losses, strict=True):
            resumed = f", resumed at step {', '.join(map(str, trial.resumed_from))}" if trial.resumed_from else ""
            print(f"rank {trial.rank}: {f'eval_loss {loss:.4f}' if loss < inf else 'no eval_loss'}{resumed}")
        best = inputs[losses.index(min(losses))]
        self.rank, self.adapter, self.history = best.rank, best.adapter, best.history
        self.base_model, self.commit, self.latest_checkpoint = best.base_model, best.commit, best.latest_checkpoint
        self.chat = best.chat
        self.resumed_from = [step for trial in inputs for step in trial.resumed_from]
        self.weights_digest = sha256("".join(sorted(trial.weights_digest for trial in inputs)).encode()).hexdigest()
        self.next(self.merge)

    @retry(times=4, minutes_between_retries=0)
    @model(load=["base_model", "adapter"])  # by the artifacts' names
    @step
    def merge(self):
        from pathlib import Path

        from use_model import merge

        base_model = common.hub.private_copy(current.model.loaded["base_model"], self.commit)
        trained, target = Path(current.model.loaded["adapter"]), base_model.parent / "merged"
        merged = merge(base_model, trained, target, self.chat)
        self.merged = current.model.save(str(merged), label="llama_factory_merged")
        self.next(self.evaluate)

    @retry(times=4, minutes_between_retries=0)
    @model(load=["merged"])
    @step
    def evaluate(self):
        from pathlib import Path

        from use_model import ask

        self.answer = ask(Path(current.model.loaded["merged"]), self.question, self.chat)
        print(f"{self.question} -> {self.answer}")
        self.next(self.end)

    @step
    def end(self):
        resumed = f", resumed at step {', '.join(map(str, self.resumed_from))}" if self.resumed_from else ""
        print(f"{self.history[-1]['step']} steps{resumed}; weights {self.weights_digest[:16]}")


if __name__ == "__main__":
    LlamaFactoryFlow()
