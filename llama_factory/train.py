"""Fine-tune with LLaMA-Factory: ``llamafactory-cli train``, as its users know it. Kill it whenever you like.

python train.py                      # checkpoints go to checkpoints/; run it again after a kill
python train.py --fresh              # forget them and start anew
"""

import json
import math
import os
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from huggingface_hub import snapshot_download
from huggingface_hub.utils import disable_progress_bars
from safetensors.torch import load_file

from common import CheckpointError, CheckpointManager, hub, weights_digest
from common.foreign import ForeignTrainer, check_arguments, history, read_state
from common.manifest import hash_file

HERE = Path(__file__).resolve().parent
MODEL_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]  # what is downloaded of a base model
STAGES = ("sft", "pt", "dpo", "kto")  # those that LLaMA-Factory can resume
OURS = ("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "adapter_name_or_path")
NOT_THE_MODEL = r"optimizer* scheduler* scaler* rng_state* trainer_state* global_step* latest zero_to* README.md"


@dataclass(frozen=True)
class TrainConfig:
    """A configuration in LLaMA-Factory's own keys, and what replaces some of them."""

    file: str = "train.yaml"  # beside this module, or a path
    overrides: dict = field(default_factory=dict)  # {"lora_rank": 16}, as in `llamafactory-cli train FILE lora_rank=16`
    commit: str = ""  # of the base model; "": what model_revision stands for now

    def __post_init__(self):
        check_arguments(self.arguments)
        if "deepspeed" in self.arguments and not self.path("deepspeed").is_file():
            raise CheckpointError(f"deepspeed is {self.arguments['deepspeed']!r}: there is no {self.path('deepspeed')}")
        if ours := sorted(set(OURS).intersection(self.arguments)):
            raise CheckpointError(f"{self.file} sets {ours[0]}: leave it out, it is set for each attempt")
        if self.arguments.get("stage") not in STAGES:
            stage = self.arguments.get("stage")
            raise CheckpointError(f"stage is {stage!r}: LLaMA-Factory resumes {', '.join(STAGES)} only")
        self.data_files()

    @property
    def arguments(self) -> dict:
        """All keys, with the overrides in place."""
        path = HERE / self.file  # a path that is absolute stays as it is
        if not path.is_file():
            raise CheckpointError(f"there is no {path}: name a YAML file beside train.py, or give its whole path")
        arguments = {**yaml.safe_load(path.read_text(encoding="utf-8")), **self.overrides}
        for key in ("eval_strategy", "save_strategy", "logging_strategy"):
            if arguments.get(key) is False:  # how YAML reads an unquoted no
                arguments[key] = "no"
        return arguments

    def path(self, key: str) -> Path:
        """What a key names, relative to the YAML file."""
        return (HERE / self.file).parent / self.arguments[key]

    def data_files(self) -> list[Path]:
        """The files of the data sets. They must be local: LLaMA-Factory would take the Hub's at any revision."""
        info, files = json.loads((self.path("dataset_dir") / "dataset_info.json").read_text(encoding="utf-8")), []
        for key in ("dataset", "eval_dataset"):
            for name in filter(None, str(self.arguments.get(key, "")).replace(" ", "").split(",")):
                path = self.path("dataset_dir") / info.get(name, {}).get("file_name", "")
                if not path.is_file():
                    raise CheckpointError(f"{key} is {name!r}: dataset_info.json names no file beside it for that")
                files.append(path)
        return files

    def fingerprint(self) -> dict:
        """What the result depends on, and a checkpoint is compared by before it is continued."""
        arguments = {key: value for key, value in self.arguments.items() if key not in ("save_steps", "model_revision")}
        files = [*self.data_files(), self.path("dataset_dir") / "dataset_info.json"]  # which columns are what
        files += [self.path("deepspeed")] if "deepspeed" in arguments else []
        return {**arguments, "data": {path.name: hash_file(path).xxh3_128 for path in files}}

    def check_ranks(self, ranks: list[int]) -> None:
        """Refuse a grid that could not be trained, or of which the best could not be chosen."""
        kind, strategy = self.arguments.get("finetuning_type", "lora"), self.arguments.get("eval_strategy", "no")
        if ranks and kind != "lora":
            raise CheckpointError(f'--ranks is {ranks} and finetuning_type is {kind}, which has none: say --ranks ""')
        if len(ranks) > 1 and (strategy == "no" or self.arguments.get("eval_on_each_dataset")):
            raise CheckpointError(
                f"--ranks is {ranks}, and no training would log the eval_loss that the best is chosen by: set "
                "eval_strategy: steps, and val_size or eval_dataset, without eval_on_each_dataset, or give one rank"
            )

    def for_chat(self) -> dict:
        """What merging and asking need as well, so that the model is asked as it was trained."""
        keys = ("template", "tool_format", "default_system", "enable_thinking")
        return {key: value for key, value in self.arguments.items() if key in keys}


@dataclass(frozen=True)
class TrainResult:
    path: Path  # a directory with the adapter (with finetuning_type full: the model) and its tokenizer
    history: list
    weights_digest: str


def parse_overrides(text: str) -> dict:
    """``"lora_rank=16 learning_rate=1.0e-4"``, as it may follow ``llamafactory-cli train FILE``."""
    pairs = [word.partition("=") for word in text.split()]
    if wrong := [name for name, equals, _ in pairs if not name or not equals]:
        raise CheckpointError(f"overrides: {wrong[0]!r} is not followed by =value")
    return {name: yaml.safe_load(value) for name, _, value in pairs}


def executable() -> str:
    """``llamafactory-cli``: the first on the PATH, or the one beside this Python."""
    places = (os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent))
    found = shutil.which("llamafactory-cli", path=os.pathsep.join(places))
    if found is None:
        raise CheckpointError(
            "there is no llamafactory-cli: install this example's requirements.txt with its constraints.txt, "
            "in an environment of their own"
        )
    return found


def environment() -> dict[str, str]:
    """Of the child. It must not ask the Hub; a fixed hash seed gives each attempt the same order of module names."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONHASHSEED": "0"}


def train(config: TrainConfig, checkpoints: CheckpointManager, base_model: Path | None = None) -> TrainResult:
    arguments, work = config.arguments, checkpoints.directory / "work"
    model = arguments["model_name_or_path"]
    commit = config.commit or hub.resolve(model, arguments.get("model_revision", "main"))
    fingerprint, total_steps = {**config.fingerprint(), "commit": commit}, arguments.get("max_steps")
    resume_from = checkpoints.restore_files(fingerprint, total_steps=total_steps)

    if base_model is None:
        disable_progress_bars()
        base_model = Path(
            snapshot_download(model, revision=commit, allow_patterns=MODEL_FILES, endpoint=hub.endpoint(model))
        )
    work.mkdir()
    (work / "base_model").symlink_to(base_model.resolve())
    arguments |= {  # the base model's name is part of every checkpoint, so it must be the same in each attempt
        "model_name_or_path": "base_model",
        "output_dir": "output",
        "resume_from_checkpoint": str(resume_from.resolve()) if resume_from else None,
        **{key: str(config.path(key).resolve()) for key in ("dataset_dir", "deepspeed") if key in arguments},
    }
    (work / "train.yaml").write_text(yaml.safe_dump(arguments), encoding="utf-8")

    trainer = ForeignTrainer(
        checkpoints, work / "output", save_steps=arguments.get("save_steps", 500), resumed=resume_from
    )
    trainer.run([executable(), "train", "train.yaml"], cwd=work, env=environment())

    last = checkpoints.load_files(checkpoints.latest)  # also when it was finished before, and only this was left to do
    path = checkpoints.directory / "model"
    shutil.copytree(last, path, ignore=shutil.ignore_patterns(*NOT_THE_MODEL.split()))
    if (path / "adapter_config.json").exists():
        adapter = json.loads((path / "adapter_config.json").read_text())
        adapter |= {"base_model_name_or_path": model, "revision": commit}
        (path / "adapter_config.json").write_text(json.dumps(adapter, indent=2) + "\n")
    weights = {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}
    return TrainResult(path, history(read_state(last)), weights_digest(weights))


if __name__ == "__main__":
    with CheckpointManager(save_every=1, fresh="--fresh" in sys.argv) as checkpoints:
        result = train(TrainConfig(), checkpoints)
    losses = [record["eval_loss"] for record in result.history if "eval_loss" in record]
    print(f"eval_loss {losses[-1] if losses else math.nan:.4f}, weights {result.weights_digest[:16]}")
