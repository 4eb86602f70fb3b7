"""What the fine-tuning depends on, and its dialogues. Nothing here imports a framework."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from common import hub

OWN_DATA = "dialogues"  # the file that ships with this example
MODEL_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
TOKENIZER_FILES = [pattern for pattern in MODEL_FILES if pattern != "*.safetensors"]

Dialogue = list[dict[str, str]]  # messages with role and content, the last one from the assistant


@dataclass(frozen=True)
class TrainConfig:
    """Everything that the result depends on; a checkpoint made under another configuration is refused."""

    base_model: str = "local/tiny-llama-chat"  # a model of the Hub; local/ names are built on the spot
    revision: str = "main"  # of the model: a branch, a tag or, as the flow does it, a commit
    dataset: str = OWN_DATA  # or a data set of the Hub, with "messages" in each row of its training split
    dataset_revision: str = "main"
    epochs: int = 20
    batch_size: int = 8  # dialogues in a step
    learning_rate: float = 1e-2
    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.05
    max_length: int = 256  # tokens of a dialogue; what is longer is cut
    seed: int = 0

    def __post_init__(self):
        for name in ("epochs", "batch_size", "lora_r", "lora_alpha", "max_length", "learning_rate"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be greater than 0")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout is {self.lora_dropout}: it must be from 0 to below 1")


def pinned(config: TrainConfig) -> TrainConfig:
    """The same with commits in place of branches and tags."""
    data = ""
    if config.dataset != OWN_DATA:
        data = hub.resolve(config.dataset, config.dataset_revision, repo_type="dataset")
    return replace(config, revision=hub.resolve(config.base_model, config.revision), dataset_revision=data)


def load_dialogues(config: TrainConfig, own: str | None = None) -> list[Dialogue]:
    """The dialogues of the data set on the Hub, or of the text ``own`` (JSON Lines), or of the file that ships.

    Raises ValueError, which names the row, for one that is not a list of messages that ends with the assistant's.
    """
    if config.dataset != OWN_DATA:
        from datasets import load_dataset

        with hub.clear_errors(config.dataset, config.dataset_revision, repo_type="dataset"):
            rows = list(enumerate(load_dataset(config.dataset, revision=config.dataset_revision, split="train"), 1))
    else:
        own = own or Path(__file__).with_name("dialogues.jsonl").read_text(encoding="utf-8")
        rows = []
        for number, line in enumerate(own.split("\n"), 1):  # splitlines() would also cut at a U+2028 in a text
            if line.strip():
                try:
                    rows.append((number, json.loads(line)))
                except ValueError as error:
                    raise ValueError(f"{config.dataset}, row {number}: it must be one JSON object: {error}") from error
    dialogues = []
    for number, row in rows:
        messages = row.get("messages") if isinstance(row, dict) else None
        texts = [(m.get("role"), m.get("content")) for m in messages] if messages else []
        if not texts or texts[-1][0] != "assistant" or not all(isinstance(t, str) for pair in texts for t in pair):
            raise ValueError(
                f'{config.dataset}, row {number}: it needs "messages", each with a role and a content, and the last '
                "one from the assistant"
            )
        dialogues.append([{"role": role, "content": content} for role, content in texts])
    if len(dialogues) < 8:
        raise ValueError(f"there are {len(dialogues)} dialogues: one in eight is held out, so it takes 8 or more")
    return dialogues
