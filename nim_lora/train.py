"""Fine-tune a chat model with LoRA and TRL's SFTTrainer. Kill it whenever you like: it ends as if nothing had happened.

python train.py                      # checkpoints go to checkpoints/; run it again after a kill
python train.py --fresh              # forget them and start anew
"""

import hashlib
import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from chat_template import training_template
from datasets import Dataset, disable_progress_bars
from export import CONFIG, WEIGHTS, check_adapter
from huggingface_hub import snapshot_download
from huggingface_hub.utils import disable_progress_bars as disable_download_bars
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from settings import MODEL_FILES, Dialogue, TrainConfig, load_dialogues, pinned
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer

from common import CheckpointManager, hub, seed_everything, weights_digest
from common.transformers import CheckpointCallback, ResumableTrainer

for quiet in (logging.disable_progress_bar, disable_progress_bars, disable_download_bars):
    quiet()
TARGET_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class TrainResult:
    path: Path  # a directory for from_pretrained: the fused model and its tokenizer
    adapter: Path  # a directory with adapter_config.json and adapter_model.safetensors, as NIM reads them
    history: list
    weights_digest: str  # of the adapter


# ------------------------------------------------------------ training


def download(config: TrainConfig) -> Path:
    """The base model, from the Hub's cache if it is there. The flow does this with @huggingface_hub."""
    name = config.base_model
    with hub.clear_errors(name, config.revision):
        return Path(snapshot_download(name, revision=config.revision, allow_patterns=MODEL_FILES,
                                      endpoint=hub.endpoint(name)))  # fmt: skip


class Progress(TrainerCallback):
    """One line per epoch."""

    def on_evaluate(self, args, state, control, metrics, **_):
        print(
            f"epoch {round(state.epoch):2}/{args.num_train_epochs}  step {state.global_step:4}/{state.max_steps}  "
            f"eval_loss {metrics['eval_loss']:.4f}  right tokens {metrics['eval_mean_token_accuracy']:.1%}", flush=True,
        )  # fmt: skip


class LoraTrainer(ResumableTrainer, SFTTrainer):
    """SFTTrainer that comes back bit for bit."""

    def create_model_card(self, *_, **__):
        """No README.md in each checkpoint."""


def train(
    config: TrainConfig,
    checkpoints: CheckpointManager,
    base_model: Path | None = None,
    dialogues: list[Dialogue] | None = None,
) -> TrainResult:
    """Fine-tune. What the flow has not brought, the base model and the dialogues, is looked up."""
    config = pinned(config)
    base_model, dialogues = base_model or download(config), dialogues or load_dialogues(config)
    learn, held_out = [d for n, d in enumerate(dialogues) if n % 8], dialogues[::8]
    seed_everything(config.seed)
    model = AutoModelForCausalLM.from_pretrained(base_model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(base_model)
    tokenizer.chat_template = training_template(tokenizer, config.base_model)  # only to learn with
    gpu = torch.cuda.is_available()

    checkpoint = CheckpointCallback(checkpoints)  # saves when due, or when asked to stop
    trainer = LoraTrainer(
        model,
        SFTConfig(
            str(checkpoints.directory / "trainer"), seed=config.seed, num_train_epochs=config.epochs,
            per_device_train_batch_size=config.batch_size, per_device_eval_batch_size=config.batch_size,
            learning_rate=config.learning_rate, lr_scheduler_type="cosine", warmup_steps=0.1,  # a tenth of all
            max_length=config.max_length, assistant_only_loss=True,  # the questions are not learnt
            eval_strategy="epoch", logging_steps=1, report_to="none", disable_tqdm=True,
            save_strategy="no",  # the manager decides: --save-every
            bf16=gpu, gradient_checkpointing=gpu, dataloader_pin_memory=gpu,
        ),
        train_dataset=Dataset.from_list([{"messages": dialogue} for dialogue in learn]),
        eval_dataset=Dataset.from_list([{"messages": dialogue} for dialogue in held_out]),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=config.lora_r, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout,
            target_modules=TARGET_MODULES, task_type="CAUSAL_LM",
        ),
        callbacks=[Progress(), checkpoint],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)

    data = hashlib.sha256(json.dumps(dialogues).encode()).hexdigest()[:16]
    total_steps = config.epochs * math.ceil(len(learn) / config.batch_size)
    resume_from = checkpoints.restore_files({**asdict(config), "data": data}, total_steps=total_steps)
    trainer.train(resume_from_checkpoint=resume_from)  # a verified private copy, or None

    # the best by the metric of keep_best; without keep_best the last
    kept = checkpoints.load_best_files() if checkpoints.best else checkpoints.load_files(checkpoints.latest)
    adapter = save_adapter(kept, checkpoints.directory / "adapter", config)
    fused = fuse(base_model, adapter, checkpoints.directory / "fused")
    return TrainResult(fused, adapter, checkpoint.history, weights_digest(load_file(adapter / WEIGHTS)))


def save_adapter(kept: Path, path: Path, config: TrainConfig) -> Path:
    """The two files of an adapter that any machine can read, out of a checkpoint of the Trainer."""
    settings = json.loads((kept / CONFIG).read_text())
    # PEFT writes the path of this machine, and the modules in another order in each process
    settings |= {"base_model_name_or_path": config.base_model, "revision": config.revision}
    settings["target_modules"] = sorted(settings["target_modules"])
    path.mkdir()
    (path / CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    save_file(load_file(kept / WEIGHTS), path / WEIGHTS, metadata={"format": "pt"})
    check_adapter(path, max_lora_rank=config.lora_r)
    return path


def fuse(base_model: Path, adapter: Path, path: Path) -> Path:
    """The base model with the adapter in its weights, and its tokenizer."""
    base = AutoModelForCausalLM.from_pretrained(base_model, dtype="auto")
    PeftModel.from_pretrained(base, str(adapter)).merge_and_unload().save_pretrained(path)
    AutoTokenizer.from_pretrained(base_model).save_pretrained(path)
    return path


# ------------------------------------------------------------ asking


@torch.no_grad()
def answers(model_path: str, questions: list[str], max_new_tokens: int = 40) -> list[str]:
    """What a saved model says to each question, greedily."""
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype="auto").eval().to(device)
    found = []
    for question in questions:
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True,
                                               return_dict=True, return_tensors="pt").to(device)  # fmt: skip
        output = model.generate(**prompt, max_new_tokens=max_new_tokens, do_sample=False)
        found.append(tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    return found


if __name__ == "__main__":
    with CheckpointManager(save_every=10, keep_best=("eval_loss", "min"), fresh="--fresh" in sys.argv) as checkpoints:
        result = train(TrainConfig(), checkpoints)
    question = "What is a checkpoint?"
    print(f"{question}\n{answers(str(result.path), [question])[0]}\nweights {result.weights_digest[:16]}")
