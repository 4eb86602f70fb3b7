"""The card of a published model, made from what the training recorded."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from .manifest import Manifest
from .redact import is_path, public

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
COMMIT = re.compile(r"[0-9a-f]{40}")
WEIGHTS = (".safetensors", ".keras", ".ubj")


@dataclass(frozen=True)
class About:
    """What the model card says. What is not given is taken from the run, where it is known there.

    Attributes:
        base_model: ``"org/name"`` or ``"org/name@COMMIT"``.
        dataset: its name, or ``"org/name"`` or ``"org/name@COMMIT"`` on the Hub.
        license: an identifier of the Hub, such as ``"apache-2.0"``.
        language: codes such as ``"en"``.
        tags: added to those that are always there.
        task: the pathspec of the Metaflow task that made it.
        step, epoch, metrics, config, environment, resumed_from: as in the checkpoint's manifest.
    """

    base_model: str = ""
    dataset: str = ""
    license: str = ""
    language: Sequence[str] = ()
    tags: Sequence[str] = ()
    task: str = ""
    step: int | None = None
    epoch: int | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict[str, Any])
    config: Mapping[str, Any] = field(default_factory=dict[str, Any])
    environment: Mapping[str, Any] = field(default_factory=dict[str, Any])
    resumed_from: Sequence[int] = ()

    def of(self, task: str, manifest: Manifest | None) -> "About":
        """The same with what a checkpoint of the task knows."""
        if manifest is None:
            return replace(self, task=task)
        m = manifest
        base, dataset = base_of(m.config), dataset_of(m.config)
        return replace(self, task=task, base_model=self.base_model or base, dataset=self.dataset or dataset,
                       step=m.step, epoch=m.epoch, metrics=m.metrics, config=m.config, environment=m.environment,
                       resumed_from=m.resumed_from)  # fmt: skip


def card(staged: Path, repo: str, about: About) -> str:
    """The model card of a folder. It has no clock times: the same model has the same card."""
    config, adapter = read_json(staged / "config.json"), read_json(staged / "adapter_config.json")
    architecture = next(iter(config.get("architectures") or []), "")
    head = architecture.partition("For")[2]
    if adapter:
        head = _HEADS.get(adapter.get("task_type") or "", "")
    base, base_commit = split_commit(about.base_model)
    library, load = _how_to_load(staged, repo, head, bool(adapter), architecture, base)
    dataset, dataset_commit = split_commit(about.dataset)
    data: Any = cast("Any", import_module("huggingface_hub")).ModelCardData(
        license=about.license or None,
        language=list(about.language) or None,
        library_name=library or None,
        pipeline_tag=_TASKS.get(head),
        base_model=base if REPOSITORY.fullmatch(base) else None,
        datasets=[dataset] if REPOSITORY.fullmatch(dataset) else None,
        tags=list(dict.fromkeys(["metaflow", *(["lora"] if adapter.get("peft_type") == "LORA" else []), *about.tags])),
    )
    made = "an adapter of" if adapter else "a model trained from"
    lines = ["---", data.to_yaml(), "---", "", f"# {repo.split('/')[1]}", ""]
    kind = f"{made} {_linked(base, base_commit)}" if base else f"a model{f' ({architecture})' if architecture else ''}"
    on = f", trained on {_linked(dataset, dataset_commit, 'datasets/')}" if dataset else ""
    lines.append(f"This is {kind}{on}. The card was made with the model, from what the training recorded.")
    lines += ["", "## How to load it", "", "```python", *load, "```"]
    if about.metrics:
        at = f" at step {about.step}" if about.step is not None else ""
        lines += ["", f"## Metrics{at}", "", *_table("metric", about.metrics)]
    if hyperparameters := public(about.config):
        lines += ["", "## Hyperparameters", "", *_table("name", hyperparameters)]
    facts: dict[str, Any] = {}
    if about.task:
        facts["Metaflow task"] = f"`{about.task}`"
    if about.step is not None:
        facts["checkpoint"] = f"step {about.step}" + (f", epoch {about.epoch}" if about.epoch is not None else "")
    if about.resumed_from:
        facts["interrupted, and resumed at step"] = ", ".join(map(str, about.resumed_from))
    if base:
        facts["base model"] = f"{base}, " + (f"commit `{base_commit}`" if base_commit else "commit unknown")
    if dataset:
        facts["data set"] = dataset + (f", commit `{dataset_commit}`" if dataset_commit else "")
    facts |= public(about.environment)
    if facts:
        lines += ["", "## Where it comes from", "", *_table("", facts)]
    return "\n".join(lines) + "\n"


_HEADS = {
    "CAUSAL_LM": "CausalLM",
    "SEQ_2_SEQ_LM": "Seq2SeqLM",
    "SEQ_CLS": "SequenceClassification",
    "TOKEN_CLS": "TokenClassification",
    "QUESTION_ANS": "QuestionAnswering",
    "FEATURE_EXTRACTION": "FeatureExtraction",
}
_TASKS = {
    "CausalLM": "text-generation",
    "Seq2SeqLM": "translation",
    "SequenceClassification": "text-classification",
    "TokenClassification": "token-classification",
    "QuestionAnswering": "question-answering",
    "MaskedLM": "fill-mask",
    "ImageClassification": "image-classification",
}


def _how_to_load(
    staged: Path, repo: str, head: str, adapter: bool, architecture: str, base: str
) -> tuple[str, list[str]]:
    """The library's name on the Hub, and lines of Python."""
    if adapter or architecture:
        library = "peft" if adapter else "transformers"
        if head not in _TASKS and head != "FeatureExtraction":
            name = "AutoPeftModel" if adapter else "AutoModel"
        else:
            name = f"{'AutoPeftModelFor' if adapter else 'AutoModelFor'}{head}"
        lines, imports = [f'model = {name}.from_pretrained("{repo}")'], [name] if not adapter else []
        for file, loader, variable in (
            ("tokenizer_config.json", "AutoTokenizer", "tokenizer"),
            ("preprocessor_config.json", "AutoImageProcessor", "processor"),
        ):
            if (staged / file).exists():
                imports.append(loader)
                lines.append(f'{variable} = {loader}.from_pretrained("{repo}")')
        if adapter and base and len(lines) == 1 and head == "CausalLM":
            imports.append("AutoTokenizer")  # that of the base model, unchanged
            lines.append(f'tokenizer = AutoTokenizer.from_pretrained("{base}")')
        first = ["from peft import " + name] if adapter else []
        return library, first + ([f"from transformers import {', '.join(imports)}"] if imports else []) + ["", *lines]
    weights = sorted(path.relative_to(staged).as_posix() for path in staged.rglob("*") if path.suffix in WEIGHTS)[0]
    library, loader, call = {
        ".keras": ("keras", "import keras", "model = keras.saving.load_model({})"),
        ".ubj": ("xgboost", "import xgboost", "model = xgboost.Booster(model_file={})"),
    }.get(Path(weights).suffix, ("", "from safetensors.torch import load_file", "weights = load_file({})"))
    if (staged / "model_index.json").exists():
        load = f'pipeline = DiffusionPipeline.from_pretrained("{repo}")'
        return "diffusers", ["from diffusers import DiffusionPipeline", "", load]
    call = call.format(f'hf_hub_download("{repo}", "{weights}")')
    return library, ["from huggingface_hub import hf_hub_download", loader, "", call]


def _linked(name: str, commit: str, folder: str = "") -> str:
    if not REPOSITORY.fullmatch(name) or name.startswith("local/"):
        return name
    return f"[{name}](https://huggingface.co/{folder}{name}{f'/tree/{commit}' if commit else ''})"


def _table(first: str, values: Mapping[str, Any]) -> list[str]:
    rows = [f"| {key} | {_cell(value)} |" for key, value in values.items()]
    return [f"| {first} | |", "|---|---|", *rows]


def _cell(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
    return text.replace("|", "\\|").replace("\n", " ")


def split_commit(name: str) -> tuple[str, str]:
    """``org/name@COMMIT`` in two."""
    name, _, commit = name.partition("@")
    return name, commit


def base_of(config: Mapping[str, Any]) -> str:
    """The base model that a configuration names, by the keys that trainings use for it."""
    names = [str(config.get(key) or "") for key in ("base_model", "model", "model_id", "model_name", "base")]
    name = next((name for name in names if REPOSITORY.fullmatch(name)), "")
    keys = [f"{prefix}{word}" for prefix in ("base_model_", "base_", "model_", "") for word in ("commit", "revision")]
    return _with_commit(name, config, keys) if name else ""


def dataset_of(config: Mapping[str, Any]) -> str:
    name = config.get("dataset") or config.get("dataset_name") or ""
    if not isinstance(name, str) or is_path(name):
        return ""
    keys = ["dataset_commit", "dataset_revision", *([] if base_of(config) else ["commit", "revision"])]
    return _with_commit(name, config, keys)


def _with_commit(name: str, config: Mapping[str, Any], keys: Sequence[str]) -> str:
    commits = [str(config[key]) for key in keys if COMMIT.fullmatch(str(config.get(key) or ""))]
    return f"{name}@{commits[0]}" if commits else name


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
