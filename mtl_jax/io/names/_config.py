"""Reading foreign model configs strictly."""

from collections.abc import Mapping
from typing import Any


def take(table: str, config: Mapping[str, Any], **keys: str) -> dict[str, Any]:
    """Renames config entries: ours=theirs.

    Raises:
      ValueError: listing the entries that are missing, or for the config of a
        checkpoint whose tensors are quantised.
    """
    if config.get("quantization_config"):
        raise ValueError(f"names.{table}: quantization_config is not supported")
    missing = sorted(theirs for theirs in keys.values() if theirs not in config)
    if missing:
        raise ValueError(f"names.{table}: config lacks {', '.join(missing)}")
    return {ours: config[theirs] for ours, theirs in keys.items()}


def choose(
    table: str,
    config: Mapping[str, Any],
    key: str,
    known: Mapping[Any, Any],
    default: Any,
) -> Any:
    """Translates one config entry.

    Raises:
      ValueError: for a value that the backbone cannot express.
    """
    value = config.get(key, default)
    if value not in known:
        supported = ", ".join(map(repr, known))
        raise ValueError(
            f"names.{table}: {key}={value!r} is not supported, only {supported}"
        )
    return known[value]
