"""Fine-tune a causal language model with LoRA. Kill it whenever you like: it ends as if nothing had happened.

python train.py                      # as config.yaml says; checkpoints go to checkpoints/; run it again after a kill
python train.py --fresh              # forget them and start anew
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from instructions import (
    IGNORED,
    Data,
    Examples,
    Rows,
    fill,
    fingerprint_of,
    json_files,
    load_tokenizer,
    prepare,
    read_rows,
)
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from settings import DATA_FILES, MODEL_FILES, OWN_DATA, TrainConfig, check_targets, parse, pinned
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils import logging

from common import CheckpointManager, hub, seed_everything, weights_digest
from common.transformers import CheckpointCallback, ResumableTrainer

logging.disable_progress_bar()
HERE = Path(__file__).parent
WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class TrainResult:
    path: Path  # a directory with the adapter, for PeftModel.from_pretrained
    history: list
    weights_digest: str  # of the adapter


# ------------------------------------------------------------ finetune


class Progress(TrainerCallback):
    """One line per evaluation."""

    def on_evaluate(self, args, state, control, metrics, **_):
        print(
            f"epoch {state.epoch:4.1f}/{args.num_train_epochs}  step {state.global_step:4}/{state.max_steps}  "
            f"eval_loss {metrics['eval_loss']:.4f}", flush=True,
        )  # fmt: skip


class LoraTrainer(ResumableTrainer):
    def _save(self, output_dir=None, state_dict=None):
        # the adapter and nothing else; "auto" would ask the Hub at each checkpoint whether the vocabulary has grown
        self.model.save_pretrained(output_dir, save_embedding_layers=False)


def add_adapter(config: TrainConfig, model) -> PeftModel:
    """Raises ValueError for a target that the model does not have, which PEFT lets pass if it has another one."""
    targets: Any = config.lora_target_modules
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    if targets == ["all-linear"]:
        targets = "all-linear"
    elif unknown := [target for target in targets if target not in names]:
        raise ValueError(f"lora_target_modules: {config.base_model} has no module {', '.join(unknown)}")
    adapted = get_peft_model(
        model,
        LoraConfig(
            task_type="CAUSAL_LM", target_modules=targets, r=config.lora_r, lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
        ),
    )  # fmt: skip
    # what adapter_config.json says: where everybody finds the base model, instead of a directory of this machine
    written = adapted.peft_config["default"]
    written.base_model_name_or_path, written.revision = config.base_model, config.revision
    written.target_modules = sorted(written.target_modules)  # it is a set, in another order in each process
    return adapted


def load_base(config: TrainConfig, base: Path):
    return AutoModelForCausalLM.from_pretrained(base, dtype=config.dtype)


def finetune(config: TrainConfig, base: Path, data: Data, checkpoints: CheckpointManager) -> TrainResult:
    """Train an adapter of the base model, whose own weights stay as they are."""
    seed_everything(config.seed)
    model = add_adapter(config, load_base(config, base))
    rows = Examples(config, data, validation=False)
    accumulation = config.batch_size // config.micro_batch_size
    checkpoint = CheckpointCallback(checkpoints)  # saves when due, or when asked to stop
    trainer = LoraTrainer(
        model,
        TrainingArguments(
            str(checkpoints.directory / "trainer"), seed=config.seed, num_train_epochs=config.epochs,
            per_device_train_batch_size=config.micro_batch_size, gradient_accumulation_steps=accumulation,
            per_device_eval_batch_size=config.micro_batch_size, prediction_loss_only=True, label_names=["labels"],
            learning_rate=config.learning_rate, lr_scheduler_type="cosine", warmup_steps=config.warmup_steps,
            eval_strategy="steps" if config.eval_steps else "epoch", eval_steps=config.eval_steps or None,
            logging_steps=5, report_to="none", disable_tqdm=True, remove_unused_columns=False,
            bf16=config.dtype == "bfloat16", use_cpu=not torch.cuda.is_available(),  # without it bf16 needs a GPU
            dataloader_pin_memory=torch.cuda.is_available(),
            save_strategy="no",  # the manager decides: save_every
        ),
        train_dataset=rows,
        eval_dataset=Examples(config, data, validation=True),
        data_collator=DataCollatorForSeq2Seq(load_tokenizer(base), label_pad_token_id=IGNORED),
        callbacks=[Progress(), checkpoint],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)

    total_steps = config.epochs * math.ceil(math.ceil(len(rows) / config.micro_batch_size) / accumulation)
    decisive = {**config.decisive(), "data": fingerprint_of(data)}
    resume_from = checkpoints.restore_files(decisive, total_steps=total_steps)
    trainer.train(resume_from_checkpoint=resume_from)  # a verified private copy, or None

    # the best by the metric of keep_best; without keep_best the last
    kept = checkpoints.load_best_files() if checkpoints.best else checkpoints.load_files(checkpoints.latest)
    path = checkpoints.directory / "adapter"
    path.mkdir()
    for name in (WEIGHTS, "adapter_config.json"):
        (kept / name).rename(path / name)
    return TrainResult(path, checkpoint.history, weights_digest(load_file(path / WEIGHTS)))


# ------------------------------------------------------------ evaluate, merge


def load_adapted(config: TrainConfig, base: Path, adapter: Path) -> PeftModel:
    return to_evaluate(PeftModel.from_pretrained(load_base(config, base), adapter))


def to_evaluate(model):
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def evaluate(
    config: TrainConfig, base: Path, adapter: Path, rows: Rows, data: Data, merged: Path | None = None, samples: int = 8
) -> dict[str, Any]:
    """The perplexity of the validation answers before and after, and some questions with both models' answers.

    Raises ValueError for a ``merged`` model that is not what base and adapter are together.
    """
    tokenizer, model = load_tokenizer(base), load_adapted(config, base, adapter)
    examples = Examples(config, data, validation=True)
    asked = [rows[row] for row in examples.rows[:samples]]
    found: dict[str, Any] = {"after": perplexity(config, model, tokenizer, examples)}
    after = [answer(config, model, tokenizer, row) for row in asked]
    with model.disable_adapter():
        found["before"] = perplexity(config, model, tokenizer, examples)
        before = [answer(config, model, tokenizer, row) for row in asked]
    pairs = zip(asked, before, after, strict=True)
    found["samples"] = [{**row, "before": old, "after": new} for row, old, new in pairs]
    if merged is not None:
        wanted = answer_logits(config, model, tokenizer, examples)
        del model  # a GPU may not have room for both
        off = answer_logits(config, to_evaluate(load_base(config, merged)), tokenizer, examples) - wanted
        if (part := (off.norm() / wanted.norm()).item()) > (1e-3 if config.dtype == "float32" else 0.05):  # rounding
            raise ValueError(
                f"the logits of the merged model differ by {part:.1%} from those of the base model with the adapter: "
                "merging went wrong. Use the adapter; with merge: false no merged model is made"
            )
    return found


@torch.no_grad()
def perplexity(config: TrainConfig, model, tokenizer, examples: Examples) -> float:
    """exp of the mean loss over all tokens of all answers."""
    collate, total, count = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED), 0.0, 0
    for start in range(0, len(examples), config.micro_batch_size):
        batch = [examples[i] for i in range(start, min(start + config.micro_batch_size, len(examples)))]
        batch = collate(batch).to(model.device)
        labels = int((batch["labels"][:, 1:] != IGNORED).sum())
        total += model(**batch).loss.item() * labels
        count += labels
    return math.exp(total / count)


@torch.no_grad()
def answer_logits(config: TrainConfig, model, tokenizer, examples: Examples) -> torch.Tensor:
    """At the tokens of the first few answers."""
    rows = [examples[i] for i in range(min(config.micro_batch_size, len(examples)))]
    batch = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)(rows).to(model.device)
    return model(**batch).logits[batch["labels"] != IGNORED].float()


@torch.no_grad()
def answer(config: TrainConfig, model, tokenizer, row: dict[str, str]) -> str:
    prompt = tokenizer(fill(config, tokenizer, row)[0], add_special_tokens=False, return_tensors="pt").to(model.device)
    output = model.generate(**prompt, max_new_tokens=48, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    text = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    return "".join(character if character.isprintable() else " " for character in text).strip()


def merge(config: TrainConfig, base: Path, adapter: Path, into: Path) -> Path:
    """Add the adapter to the weights: a model like any other, for programs that know no adapters."""
    load_adapted(config, base, adapter).merge_and_unload().save_pretrained(into)
    load_tokenizer(base).save_pretrained(into)
    return into


# ------------------------------------------------------------ without Metaflow


def download(config: TrainConfig) -> tuple[Path, Rows]:
    """The base model and the data, of which the Hub's client keeps a copy. The flow has @huggingface_hub for it."""
    base = snapshot_download(
        config.base_model, revision=config.revision, allow_patterns=MODEL_FILES,
        endpoint=hub.endpoint(config.base_model),
    )  # fmt: skip
    check_targets(config, Path(base))
    if config.dataset == OWN_DATA:
        return Path(base), read_rows({"instructions.jsonl": (HERE / "instructions.jsonl").read_text("utf-8")})
    data = snapshot_download(
        config.dataset, revision=config.dataset_revision, allow_patterns=DATA_FILES, repo_type="dataset",
        endpoint=hub.endpoint(config.dataset),
    )  # fmt: skip
    return Path(base), read_rows(json_files(Path(data)))


def train(config: TrainConfig, checkpoints: CheckpointManager) -> TrainResult:
    """From the download to the adapter, in one go."""
    config = pinned(config)
    base, rows = download(config)
    return finetune(config, base, prepare(config, rows, base), checkpoints)


if __name__ == "__main__":
    fresh = "--fresh" in sys.argv
    config = pinned(TrainConfig(**parse((HERE / "config.yaml").read_text())))
    base, rows = download(config)
    with CheckpointManager("checkpoints/shards", fresh=fresh) as checkpoints:
        data = prepare(config, rows, base, checkpoints)
    best = ("eval_loss", "min")
    with CheckpointManager(
        "checkpoints/adapter", save_every=config.save_every, keep_best=best, fresh=fresh
    ) as checkpoints:
        result = finetune(config, base, data, checkpoints)
    found = evaluate(config, base, result.path, rows, data)
    print(f"perplexity {found['before']:.0f} -> {found['after']:.1f}, weights {result.weights_digest[:16]}")
