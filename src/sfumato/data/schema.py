"""The declared, public side of a table: bounds of numeric columns, categories of the others."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConfigurationError, DataError

_EXPONENT = re.compile(r"^[-+]?(?:\d+(?:\.\d*)?|\.\d+)[eE][-+]?\d+$")


@dataclass(frozen=True)
class Schema:
    """``bounds``: column -> (low, high); ``categories``: column -> allowed values, as text."""

    bounds: dict[str, tuple[float, float]] = field(default_factory=dict)
    categories: dict[str, tuple[str, ...]] = field(default_factory=dict)


def read_schema(path: str) -> Schema:
    """A YAML file ``column: [low, high]`` (two numbers) or ``column: [name, name, …]`` (text)."""
    try:
        import yaml
    except ImportError:
        raise ConfigurationError("--bounds needs PyYAML.", fix="pip install 'sfumato[cli]'") from None
    try:
        content = _loader(yaml.SafeLoader)(Path(path).read_text(encoding="utf-8")).get_single_data()
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"--bounds {path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise DataError(f"--bounds {path} must map column names to [low, high] or to a list of categories")
    schema = Schema()
    for column, value in content.items():
        if not isinstance(value, list) or len(value) < 2:
            raise DataError(f"--bounds {path}: {column} must be [low, high] or a list of two or more categories")
        if all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in value):
            if len(value) != 2 or not all(map(math.isfinite, value)) or value[0] >= value[1]:
                raise DataError(f"--bounds {path}: {column} needs two finite numbers, low < high; got {value}")
            schema.bounds[str(column)] = (float(value[0]), float(value[1]))
        else:
            schema.categories[str(column)] = tuple(str(v) for v in value)
    return schema


def _loader(safe: type[Any]) -> type[Any]:
    """YAML 1.1 reads 1e5 as text, which would turn a bound into a category; YAML 1.2 reads a number."""

    class Loader(safe):  # type: ignore[misc]
        pass

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))
    return Loader
