"""What does not leave this machine with a model: its paths, and secrets."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

SECRET_KEY = re.compile(r"(^|[_-])(token|secret|password|passwd|api_?key|access_key|credentials?)$", re.IGNORECASE)
SECRET = re.compile(r"\b(hf_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{20,}|ghp_[A-Za-z0-9]{30,}|AKIA[A-Z0-9]{12,})")
PLACES = re.compile(r"(path|dir|file|folder|checkpoint)s?$")  # keys that say where something was


def is_path(value: Any) -> bool:
    """Whether it is an absolute path. A short one, such as /think, can be a word as well."""
    if not isinstance(value, str) or "\n" in value or not re.match(r"/|~/|file:/|[A-Za-z]:[\\/]", value):
        return False
    return not value.startswith("/") or len(Path(value).parts) > 2 or (value != "/" and Path(value).exists())


def public(values: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without paths of this machine and without secrets."""
    kept: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            kept[key] = public(cast("dict[str, Any]", value))
        elif not SECRET_KEY.search(key) and not SECRET.search(str(value)) and not any(map(is_path, flat(value))):
            kept[key] = value
    return kept


def flat(value: Any) -> list[Any]:
    return list(cast("Sequence[Any]", value)) if isinstance(value, (list, tuple)) else [value]
