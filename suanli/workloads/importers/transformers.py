"""Architectures of the `transformers` package, built from a configuration, with random weights.

`hf:bert`, `hf:gpt2?n_layer=2`, `hf:path/to/config.json`: nothing is read from the network, no
weights are loaded and no code that comes with a configuration is run.
"""

import difflib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import torch
from torch import nn

from suanli.base.errors import BadInputError
from suanli.base.lazy import need
from suanli.workloads.record import Inputs, Workload
from suanli.workloads.seeding import INPUT_SEED, pictures, random_weights, tokens, values

_INSTALL = "pip install 'suanli[models]'"
_LENGTH = 128


def from_config(ref: str) -> Workload:
    """The base model of a configuration, with example inputs of its kind.

    Args:
        ref: `hf:` and a model type or the path of a `config.json` (or of its folder), and after a
            question mark fields that replace those of the configuration.

    Raises:
        BadInputError: An unknown type or field, a broken file, or inputs that are not known.
        MissingBackendError: transformers is absent.
    """
    base, _, query = ref.removeprefix("hf:").partition("?")
    changes = {key: _value(text) for key, text in parse_qsl(query)}
    path = Path(base)
    if base and path.is_dir():
        path = path / "config.json"
    from_path = path.suffix == ".json"
    if from_path:
        ref = ref.replace(base, str(path.resolve()), 1)
    config = make_config(base if not from_path else path, changes)
    return Workload(
        name=f"hf:{config.model_type}",
        ref=ref,
        make_model=partial(make_model, config),
        make_inputs=_input_maker(config),
        max_batch=64,
        note="random weights: speed and rounding are real, answers mean nothing",
    )


def make_config(base: str | Path, changes: dict[str, Any]) -> Any:
    """A configuration by model type or from a JSON file, with some fields replaced.

    Raises:
        BadInputError: See `from_config`.
        MissingBackendError: transformers is absent.
    """
    transformers = need("transformers", _INSTALL)
    fields: dict[str, Any] = {}
    if isinstance(base, Path):
        fields = _read(base)
        base = str(fields.pop("model_type", ""))
    known = list(transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES)
    if base not in known:
        near = difflib.get_close_matches(base, known, n=3, cutoff=0.5)
        step = f"near names: {', '.join(near)}" if near else "see the models of transformers"
        raise BadInputError(f"transformers has no architecture {base!r}", next_step=step)
    try:
        config = transformers.AutoConfig.for_model(base, **fields)
        for key, value in changes.items():
            if not hasattr(config, key):
                raise BadInputError(
                    f"{base} has no setting {key!r}", next_step=_fields(config, key)
                )
            setattr(config, key, value)
    except (TypeError, ValueError, AttributeError) as error:
        raise BadInputError(f"no configuration of {base}: {_line(error)}") from None
    if getattr(config, "use_cache", False):
        config.use_cache = False
    return config


def make_model(config: Any, kind: str = "AutoModel") -> nn.Module:
    """A model of a configuration with weights from a fixed seed, in evaluation mode.

    Args:
        config: From `make_config`.
        kind: Name of the automatic class, such as "AutoModelForCausalLM".

    Raises:
        BadInputError: The configuration does not make a model.
    """
    transformers = need("transformers", _INSTALL)
    build = partial(getattr(transformers, kind).from_config, config, dtype=torch.float32)
    try:
        return random_weights(build, _probe(config))
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise BadInputError(f"{config.model_type} cannot be built: {_line(error)}") from None


def _probe(config: Any) -> torch.Tensor | None:
    """A batch for the statistics of batch norm, which only networks for pictures have."""
    if _main_input(config) != "pixel_values" or hasattr(config, "text_config"):
        return None
    pixels: torch.Tensor = _input_maker(config)(4).kwargs["pixel_values"]
    return pixels


def _read(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInputError(f"no file {path}") from None
    except (OSError, ValueError) as error:
        raise BadInputError(f"{path.name} is no JSON file: {_line(error)}") from None
    if not isinstance(fields, dict) or not fields.get("model_type"):
        raise BadInputError(f"{path.name} names no model_type")
    if "auto_map" in fields:
        raise BadInputError(f"{path.name} wants code of its own to run, which is refused")
    return fields


def _input_maker(config: Any) -> Callable[[int], Inputs]:
    name = _main_input(config)
    if hasattr(config, "text_config") and hasattr(config, "vision_config"):
        parts = (_text_maker(config.text_config, False), _pixel_maker(config.vision_config))
        return partial(_joined, parts)
    if name == "input_ids":
        both = bool(getattr(config, "is_encoder_decoder", False))
        return _text_maker(getattr(config, "text_config", config), both)
    if name == "pixel_values":
        return _pixel_maker(config)
    if name == "input_values":
        return partial(_sound_inputs, 16_000)
    raise BadInputError(
        f"no example inputs are known for {config.model_type}, which takes {name}",
        next_step="make it in a Python file and give file.py:name",
    )


def _joined(parts: tuple[Callable[[int], Inputs], ...], batch: int) -> Inputs:
    kwargs: dict[str, Any] = {}
    for part in parts:
        kwargs |= part(batch).kwargs
    return Inputs(kwargs=kwargs)


def _text_maker(config: Any, both: bool) -> Callable[[int], Inputs]:
    most = int(getattr(config, "max_position_embeddings", None) or 2 * _LENGTH)
    # some architectures start counting positions at two
    length = _LENGTH if most > _LENGTH + 2 else max(1, most - 2)
    return partial(_token_inputs, int(config.vocab_size), length, both)


def _pixel_maker(config: Any) -> Callable[[int], Inputs]:
    side = getattr(config, "image_size", None) or 224
    side = side if isinstance(side, int) else side[0]
    return partial(_pixel_inputs, int(getattr(config, "num_channels", 3)), int(side))


def _main_input(config: Any) -> str:
    transformers = need("transformers", _INSTALL)
    try:
        model_class = transformers.MODEL_MAPPING[type(config)]
    except KeyError:
        raise BadInputError(f"{config.model_type} has no base model in transformers") from None
    if isinstance(model_class, list | tuple):
        model_class = model_class[0]
    return str(getattr(model_class, "main_input_name", "input_ids"))


def _token_inputs(vocabulary: int, length: int, both: bool, batch: int) -> Inputs:
    ids = tokens(batch, length, vocabulary)
    kwargs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if both:
        kwargs["decoder_input_ids"] = tokens(batch, length, vocabulary, seed=INPUT_SEED + 1)
    return Inputs(kwargs=kwargs)


def _pixel_inputs(channels: int, side: int, batch: int) -> Inputs:
    return Inputs(kwargs={"pixel_values": pictures(batch, channels, side)})


def _sound_inputs(length: int, batch: int) -> Inputs:
    return Inputs(kwargs={"input_values": values(batch, length)})


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _fields(config: Any, key: str) -> str:
    near = difflib.get_close_matches(key, list(config.to_dict()), n=3, cutoff=0.5)
    return f"near names: {', '.join(near)}" if near else ""


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
