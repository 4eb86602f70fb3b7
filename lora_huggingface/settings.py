"""Every knob of the fine-tuning with its type, and the reader of config.yaml, which refuses what it does not know."""

import dataclasses
import difflib
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from common import hub

OWN_DATA = "instructions"  # the file that ships with this example
MODEL_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]  # what is downloaded
DATA_FILES = ["*.json", "*.jsonl"]
# lm_head, because the tiny model is random there, too; a real one does without, and one that ties it must
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """What the result depends on, and at the end what it does not; a change to the former is refused on a restart."""

    base_model: str = "local/tiny-llama-chat"  # a model of the Hub; local/ names are built on the spot
    revision: str = "main"  # of the model: a branch, a tag or, as the flow does it, a commit
    dataset: str = OWN_DATA  # or a data set of the Hub with instruction, input and output in JSON or JSON Lines
    dataset_revision: str = "main"
    prompt_template: str = "chat"  # the tokenizer's own, or "alpaca"
    val_set_size: int = 56  # rows
    cutoff_len: int = 128  # tokens of a row, prompt and answer; what is longer is cut
    lora_r: int = 8
    lora_alpha: int = 16
    lora_dropout: float = 0.05
    lora_target_modules: list[str] = dataclasses.field(default_factory=lambda: list(TARGETS))  # or ["all-linear"]
    dtype: str = "float32"  # of the frozen weights; the adapter is always float32
    epochs: int = 10
    batch_size: int = 16  # rows in an optimizer step
    micro_batch_size: int = 8  # rows at once: batch_size / micro_batch_size gradients are accumulated
    learning_rate: float = 2e-2
    warmup_steps: float = 0.1  # a number of steps; below 1 a part of all
    eval_steps: int = 0  # 0: at the end of each epoch
    seed: int = 0
    # not the result's business
    shard_size: int = 50  # rows that are tokenized between two checkpoints of the preparation
    save_every: int | str = 10  # steps (20), time (10m) or both (500,10m)
    merge: bool = True  # also save a model with the adapter in its weights

    def __post_init__(self) -> None:
        for name in ("cutoff_len", "lora_r", "lora_alpha", "epochs", "batch_size", "micro_batch_size", "shard_size",
                     "val_set_size", "learning_rate"):  # fmt: skip
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be greater than 0")
        for name in ("warmup_steps", "eval_steps"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must not be negative")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout is {self.lora_dropout}: it must be from 0 to below 1")
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size is {self.batch_size}: it must be a multiple of micro_batch_size, {self.micro_batch_size}"
            )
        if not self.lora_target_modules:
            raise ValueError("lora_target_modules is empty: name modules, such as q_proj, or all-linear")
        choices = {"prompt_template": ("chat", "alpaca"), "dtype": ("float32", "bfloat16")}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}: choose one of {', '.join(known)}")

    def decisive(self) -> dict[str, Any]:
        """What a checkpoint of the training must agree with."""
        free = ("shard_size", "save_every", "merge")
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in free}


def pinned(config: TrainConfig) -> TrainConfig:
    """The same with commits in place of branches and tags. Raises HubError."""
    revision = hub.resolve(config.base_model, config.revision)
    data = ""  # what ships with the example has no commit
    if config.dataset != OWN_DATA:
        data = hub.resolve(config.dataset, config.dataset_revision, repo_type="dataset")
    return dataclasses.replace(config, revision=revision, dataset_revision=data)


def check_targets(config: TrainConfig, base: Path | str) -> None:
    """Raises ValueError for targets whose weights are another module's, too: merging them would change both.

    Args:
        base: a directory with the config.json of the base model.
    """
    from transformers import AutoConfig  # it takes seconds, and reading the settings needs it not

    shared = [target for target in config.lora_target_modules if target in ("lm_head", "embed_tokens")]
    # its class knows the value where config.json leaves it out
    if shared and AutoConfig.from_pretrained(base).get_text_config().tie_word_embeddings:
        raise ValueError(
            f"lora_target_modules has {' and '.join(shared)}, but in {config.base_model} lm_head and embed_tokens are "
            "one matrix (tie_word_embeddings), so merging would change both: take it out of lora_target_modules"
        )


def parse(text: str) -> dict[str, Any]:
    """The settings in a YAML text; what it leaves out has its default.

    Raises ValueError, which names the key, for an unknown one, for one that stands there twice, for a value of another
    type, and for one that makes no sense.
    """
    try:
        node = yaml.compose(text, yaml.SafeLoader)
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"the configuration is not YAML: {error}") from error
    if found is None:
        found = {}
    if not isinstance(found, dict):
        raise ValueError(f"the configuration is a {type(found).__name__}: write one `key: value` on each line")
    names = [key.value for key, _ in node.value] if node is not None else []
    types = get_type_hints(TrainConfig)
    for name, value in found.items():
        if names.count(name) > 1:
            raise ValueError(f"{name!r} is set {names.count(name)} times in the configuration: set it once")
        if name not in types:
            near = difflib.get_close_matches(str(name), types, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(types)}"
            raise ValueError(f"{name!r} is not a setting: {hint}")
        found[name] = _checked(name, value, types[name])
    return dataclasses.asdict(TrainConfig(**found))


def _checked(name: str, value: Any, wanted: Any) -> Any:
    if wanted is float and isinstance(value, str):  # for YAML 1e-3 is a text, only 1.0e-3 is a number
        try:
            return float(value)
        except ValueError:
            pass
    if wanted == list[str]:
        fits = isinstance(value, list) and all(isinstance(item, str) for item in value)
    elif isinstance(value, bool):
        fits = wanted is bool
    else:
        fits = isinstance(value, (int, float) if wanted is float else wanted)
    if not fits:
        kind = "a list of texts" if wanted == list[str] else getattr(wanted, "__name__", str(wanted))
        raise ValueError(f"{name} is {value!r}, a {type(value).__name__}: it must be {kind}")
    return float(value) if wanted is float else value
