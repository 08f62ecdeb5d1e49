"""`load_classifier`: a transformers encoder with a classification head."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qalora_compile.capture.checkpoints.open_folder import is_quantized
from qalora_compile.capture.load_source import (
    Source,
    check_safetensors,
    text_example,
)
from qalora_compile.capture.loading import unreadable
from qalora_compile.capture.sentence import encoder_folder
from qalora_compile.capture.skeleton import transformers_module
from qalora_compile.errors import UnsupportedError, UserInputError
from qalora_compile.untrusted.tokenizer import load_tokenizer


def load_classifier(reference: str, classes: Sequence[str], *, seed: int = 0) -> Source:
    """Load a checkpoint with a classification head, in float32.

    `Source.head` names the parameters of the head and all others that the checkpoint does not hold,
    which must be trained. The head starts at random values, or at those of a checkpoint for these
    classes.

    Args:
        reference: A Hugging Face folder.
        classes: The names of the classes. `classes_of` returns their order in the model.
        seed: Seed of the random values.

    Raises:
        UserInputError: the folder does not hold a model, or its head is for other classes.
        UnsupportedError: transformers has no such head for the architecture, or there is no
            tokenizer.
    """
    path = encoder_folder(Path(reference))
    if not path.is_dir():
        raise UserInputError(
            f"a classification task starts from a Hugging Face folder, not {reference!r}",
            hint="train other models by a loop of your own: qc.insert_adapters(…, train=head)",
        )
    check_safetensors(path)
    if is_quantized(path):
        raise UnsupportedError(
            "a classification task starts from a model in float, but this one is quantized",
            where=reference,
            hint="give the model that it was made from",
        )
    tokenizer = load_tokenizer(path)
    if tokenizer is None:
        raise UnsupportedError("the model has no tokenizer to read text with", where=reference)
    transformers = transformers_module()
    config = _config(transformers, path)
    kind = _class_of(transformers, config, path)
    names = _in_order(config, classes, path)
    config.id2label = dict(enumerate(names))
    config.label2id = {name: index for index, name in enumerate(names)}
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model, found = kind.from_pretrained(
                path,
                config=config,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
            )
    except Exception as error:  # transformers and safetensors raise exceptions of many types
        raise unreadable(path, error) from error
    inside, missing = f"{model.base_model_prefix}.", set(found["missing_keys"])
    names = [name for name, _ in model.named_parameters()]
    head = tuple(name for name in names if name in missing or not name.startswith(inside))
    example = text_example(model)
    return Source(reference, "huggingface", model.eval(), (), example, tokenizer, head=head)


def classes_of(source: Source) -> tuple[str, ...]:
    """The names of the classes of a classifier, in the order of its logits."""
    config: Any = source.model.config
    return tuple(config.id2label[index] for index in range(len(config.id2label)))


def linear_layers(model: nn.Module, parameters: Sequence[str]) -> tuple[str, ...]:
    """The paths of the linear layers that own any of these parameters."""
    owners = dict.fromkeys(name.rpartition(".")[0] for name in parameters)
    return tuple(path for path in owners if isinstance(model.get_submodule(path), nn.Linear))


def _config(transformers: Any, path: Path) -> Any:
    try:
        return transformers.AutoConfig.from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # transformers raises exceptions of many types
        raise unreadable(path, error) from error


def _class_of(transformers: Any, config: Any, path: Path) -> Any:
    """The transformers class with a classification head."""
    if type(config) not in transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise UnsupportedError(
            f"transformers has no classification head for {config.model_type!r}",
            where=str(path / "config.json"),
            hint="use an encoder, such as BERT, DistilBERT, RoBERTa or ModernBERT",
        )
    return transformers.AutoModelForSequenceClassification


def _in_order(config: Any, classes: Sequence[str], path: Path) -> list[str]:
    """The classes in the order of the logits, which a checkpoint with such a head determines.

    Raises:
        UserInputError: it has a head for other classes.
    """
    architectures = config.architectures or []
    if not any(name.endswith("ForSequenceClassification") for name in architectures):
        return list(classes)
    own = [str(config.id2label[index]) for index in sorted(config.id2label)]
    if sorted(own) != sorted(classes):
        raise UserInputError(
            f"the checkpoint's classes are {', '.join(own)}, the data's {', '.join(classes)}",
            where=str(path / "config.json"),
            hint="use the checkpoint's labels, or give the encoder without its head",
        )
    return own
