"""`PeftSettings`: the settings in PEFT's `adapter_config.json`, layer by layer.

Only known settings are accepted, and those whose update is not LoRA are refused by name. The rest
is read through `peft.LoraConfig`, with PEFT's own defaults and checks. PEFT's rules determine which
layers are adapted, and with which rank and alpha; expressions are untrusted and therefore matched
in linear time (`untrusted.patterns`).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qalora_compile.errors import UnsupportedError, UserInputError
from qalora_compile.optional import require
from qalora_compile.untrusted import quoted, read_object
from qalora_compile.untrusted.patterns import matches

CONFIG_FILE = "adapter_config.json"
_ALL_LINEAR = "all-linear"
_LARGEST_ALPHA, _LARGEST_RANK, _LARGEST_POOL = 1e30, 1 << 20, 1 << 24
_LAYER = re.compile(r".*?\.[^.]*\.(\d+)\.")
"""The number of a layer: the first in a path, as in PEFT."""
_CHANGED_BASE = ("pissa", "olora", "corda", "lora_ga")
"""Initializations that modify the base, so that the adapter fits only that base."""
_OTHER_FORMS = {
    "use_dora": "DoRA scales the complete weight, which group offsets cannot represent",
    "layer_replication": "layers of the base are repeated",
    "alora_invocation_tokens": "the adapter is switched on by tokens",
    "use_bdlora": "its factors are block-diagonal",
    "kasa_config": "its update is scaled by singular values",
    "monteclora_config": "its update is drawn at random",
    "arrow_config": "it is a router over other adapters",
    "target_parameters": "it adapts parameters of stacked experts",
    "trainable_token_indices": "it trains rows of an embedding",
    "lora_bias": "its B has a bias",
    "megatron_config": "its layers are split over devices",
}
"""Settings whose update is neither of the two above, and what it is instead."""
_KNOWN = frozenset(
    (
        *_OTHER_FORMS,
        *("peft_type", "peft_version", "task_type", "inference_mode", "auto_mapping", "revision"),
        *("base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "rank_pattern"),
        *("alpha_pattern", "target_modules", "exclude_modules", "layers_to_transform"),
        *("layers_pattern", "modules_to_save", "fan_in_fan_out", "bias", "use_rslora"),
        *("init_lora_weights", "use_qalora", "qalora_group_size", "qalora_pooling"),
        *("megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
        *("velora_config", "ensure_weight_tying", "runtime_config"),
    )
)
"""Settings that are supported, or do not affect a trained adapter."""
_READ = (
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_qalora"),
    *("qalora_group_size", "target_modules", "exclude_modules", "modules_to_save"),
    *("layers_to_transform", "layers_pattern"),
)
"""Settings that determine a trained adapter."""
_NAMES = ("target_modules", "exclude_modules", "layers_pattern")
_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("use_qalora", "use_rslora"), (bool,)),
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), (dict,)),
    **dict.fromkeys(_NAMES, (str, list)),
    "modules_to_save": (list,),
    "layers_to_transform": (int, list),
    "base_model_name_or_path": (str,),
}
"""The types of settings that are not null."""


@dataclass(frozen=True)
class PeftSettings:
    """The settings of an adapter.

    Attributes:
        config: A `peft.LoraConfig`.
        base: The base model that the adapter names.
        where: The file, for messages.
    """

    config: Any
    base: str
    where: str

    @classmethod
    def read(cls, folder: Path) -> PeftSettings:
        """Read `adapter_config.json`.

        Raises:
            UserInputError: it is missing or malformed, or the folder holds several adapters.
            UnsupportedError: the adapter is not LoRA, or has an unknown setting, which the error
                names.
        """
        said, where = _read(folder), str(folder / CONFIG_FILE)
        _check_kind(said, where)
        _check_types(said, where)
        peft = require("peft", extra="hf", purpose="read adapters of PEFT")
        try:
            with warnings.catch_warnings():  # about settings that do not affect a trained adapter
                warnings.simplefilter("ignore")
                config = peft.LoraConfig(**{name: said[name] for name in _READ if name in said})
        except (TypeError, ValueError) as error:
            raise UserInputError(f"PEFT refuses the settings: {error}", where=where) from error
        return cls(config, str(said.get("base_model_name_or_path") or ""), where)

    def rank(self, path: str) -> int:
        """The rank of a layer's adapter.

        Raises:
            UserInputError: it is not an integer from 1.
        """
        rank = self._of_layer("rank_pattern", path, self.config.r)
        if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= _LARGEST_RANK:
            raise UserInputError(
                f"the rank (r, rank_pattern) of {path} is {quoted(rank)}",
                where=self.where,
                hint="give an integer from 1",
            )
        return rank

    def scaling(self, path: str) -> float:
        """The factor of B A: alpha / r, or alpha / √r.

        Raises:
            UserInputError: alpha is not a number in the range of float32.
        """
        alpha, rank = self._of_layer("alpha_pattern", path, self.config.lora_alpha), self.rank(path)
        number = isinstance(alpha, (int, float)) and not isinstance(alpha, bool)
        if not number or not -_LARGEST_ALPHA <= alpha <= _LARGEST_ALPHA:
            raise UserInputError(f"lora_alpha of {path} is {quoted(alpha)}", where=self.where)
        scaling: float = alpha / (rank**0.5 if self.config.use_rslora else rank)
        return scaling

    def pool(self) -> int | None:
        """How many inputs are pooled; None if the adapter does not pool.

        Raises:
            UserInputError: it pools, but the number is not an integer from 1.
        """
        if not self.config.use_qalora:
            return None
        pool = self.config.qalora_group_size
        if isinstance(pool, bool) or not isinstance(pool, int) or not 1 <= pool <= _LARGEST_POOL:
            raise UserInputError(f"qalora_group_size is {quoted(pool)}", where=self.where)
        return pool

    def why_not(self, path: str) -> str:
        """The setting by which PEFT would exclude a layer from adaptation, or "".

        Raises:
            UserInputError: an expression cannot be matched.
        """
        config = self.config
        if config.exclude_modules and self._is_named("exclude_modules", path):
            return f"one of the exclude_modules {quoted(config.exclude_modules)}"
        for name in config.modules_to_save or ():
            if self._matches(rf"(^|.*\.){name}($|\..*)", path, "modules_to_save", full=False):
                return f"one of the modules_to_save {quoted(config.modules_to_save)}"
        targets = config.target_modules
        if targets is None or targets == _ALL_LINEAR:
            return ""
        if not self._is_named("target_modules", path):
            shown = targets if isinstance(targets, str) else sorted(targets)
            return f"none of the target_modules {quoted(shown)}"
        wanted = config.layers_to_transform
        if isinstance(targets, str) or path in targets or wanted is None or wanted == []:
            return ""
        if self._layer(path) not in ([wanted] if isinstance(wanted, int) else wanted):
            return f"in none of the layers_to_transform {quoted(wanted)}"
        return ""

    def _layer(self, path: str) -> int | None:
        """The number of the layer in a path."""
        patterns = self.config.layers_pattern
        for pattern in [patterns] if isinstance(patterns, str) else patterns or ():
            for found in re.finditer(r"\.(\d+)\.", path):
                head = path[: found.start()]
                if self._matches(rf"(.*\.)?({pattern})", head, "layers_pattern", full=True):
                    return int(found[1])
        found_first = None if patterns else _LAYER.match(path)
        return None if found_first is None else int(found_first[1])

    def _is_named(self, setting: str, path: str) -> bool:
        """Whether names, or an expression that matches complete paths, select a layer."""
        names = getattr(self.config, setting)
        if isinstance(names, str):
            return self._matches(names, path, setting, full=True)
        return any(path == name or path.endswith(f".{name}") for name in names)

    def _of_layer(self, patterns: str, path: str, general: Any) -> Any:
        """The setting of one layer, by the first pattern that matches the end of its path."""
        for pattern, value in (getattr(self.config, patterns) or {}).items():
            if self._matches(rf"(.*\.)?({pattern})", path, patterns, full=True):
                return value
        return general

    def _matches(self, pattern: str, text: str, setting: str, *, full: bool) -> bool:
        try:
            return matches(pattern, text, full=full)
        except UserInputError as error:
            error.where = f"{self.where}: {setting}"
            raise


def _read(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG_FILE).is_file():
        inside = sorted(file.parent.name for file in folder.glob(f"*/{CONFIG_FILE}"))
        raise UserInputError(
            f"the folder holds {len(inside)} adapters: {', '.join(inside)}"
            if inside
            else f"the folder holds no {CONFIG_FILE}",
            where=str(folder),
            hint=f"give one of them: {folder / inside[0]}"
            if inside
            else "give a folder written by save_pretrained of PEFT",
        )
    return read_object(folder / CONFIG_FILE, finite=True)


def _check_kind(config: Mapping[str, Any], where: str) -> None:
    """Check that the adapter is LoRA, and that every setting is known.

    Raises:
        UnsupportedError: it is not LoRA, or a setting is unknown; the error names it.
    """
    if config.get("peft_type") != "LORA":
        raise UnsupportedError(
            f"the adapter is of the kind {config.get('peft_type')}, not LORA", where=where
        )
    for name, what in _OTHER_FORMS.items():
        if config.get(name):
            raise UnsupportedError(
                f"the adapter cannot be taken: {what} ({name})",
                where=where,
                hint="merge it into a float model with PEFT (merge_and_unload), and quantize that",
            )
    for name, value in config.items():
        if name not in _KNOWN and value:
            raise UnsupportedError(
                f"the adapter has the setting {quoted(name)}, which is not known: {quoted(value)}",
                where=where,
                hint="merge it into a float model with PEFT (merge_and_unload), and quantize that",
            )
    start = str(config.get("init_lora_weights", "")).lower()
    if start == "loftq":
        raise UnsupportedError(
            "the adapter was initialized by LoftQ, whose base is the quantized model that it was "
            "trained with",
            where=where,
            hint="merge it into that base with PEFT (merge_and_unload), save it, and quantize that",
        )
    if start.startswith(_CHANGED_BASE):
        raise UnsupportedError(
            f"the adapter was initialized by {start!r}, which changes the base: it fits no other",
            where=where,
            hint="save it with PEFT's path_initial_model_for_weight_conversion",
        )


def _check_types(config: Mapping[str, Any], where: str) -> None:
    """Check that settings have the types that PEFT writes.

    Raises:
        UserInputError: one has another type; the error names it.
    """
    for name, value in config.items():
        fits = value is None or isinstance(value, _TYPES.get(name, (object,)))
        if fits and isinstance(value, list):
            kind = int if name == "layers_to_transform" else str
            fits = name not in _TYPES or all(isinstance(each, kind) for each in value)
        if not fits or (name == "layers_to_transform" and isinstance(value, bool)):
            raise UserInputError(f"{name} is {quoted(value)}", where=where)
