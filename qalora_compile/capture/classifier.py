"""`load_classifier`: an encoder of texts, images or audio with a classification head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

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
from qalora_compile.progress import say
from qalora_compile.untrusted import read_object
from qalora_compile.untrusted.artifacts import CONFIG_FILE
from qalora_compile.untrusted.media_processor import (
    AUDIO,
    IMAGE,
    MediaProcessor,
    load_media_processor,
)
from qalora_compile.untrusted.tokenizer import load_tokenizer


@dataclass(frozen=True)
class _Kind:
    """The classifiers of one kind of data, in transformers.

    Attributes:
        classes: Attribute of transformers with the class that reads such a model.
        mapping: Attribute of transformers with the configurations that it knows.
        endings: How the names of architectures with such a head end.
        example: Encoders to name in an error.
    """

    classes: str
    mapping: str
    endings: tuple[str, ...]
    example: str


TEXT = "text"
_SEQUENCE = "ForSequenceClassification"
_KINDS = {
    TEXT: _Kind(
        "AutoModelForSequenceClassification",
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
        (_SEQUENCE,),
        "BERT, DistilBERT, RoBERTa or ModernBERT",
    ),
    IMAGE: _Kind(
        "AutoModelForImageClassification",
        "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING",
        ("ForImageClassification",),
        "ViT, DeiT, DINOv2 or ResNet",
    ),
    AUDIO: _Kind(
        "AutoModelForAudioClassification",
        "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING",
        ("ForAudioClassification", _SEQUENCE),
        "Wav2Vec2, HuBERT, WavLM or AST",
    ),
}


def load_classifier(
    reference: str,
    classes: Sequence[str],
    *,
    seed: int = 0,
    reads: str = TEXT,
    complete: bool = False,
) -> Source:
    """Load a checkpoint with a classification head, in float32.

    `Source.head` names the parameters of the head and all others that the checkpoint does not hold,
    which must be trained. The head starts at random values, or at those of a checkpoint for these
    classes. A head of an image or audio model for other classes is replaced, and a note says so:
    such encoders are seldom published without one.

    Args:
        reference: A Hugging Face folder.
        classes: The names of the classes. `classes_of` returns their order in the model.
        seed: Seed of the random values.
        reads: `text`, `image` or `audio`.
        complete: Whether the checkpoint must hold every parameter.

    Raises:
        UserInputError: the folder does not hold a model, its head is for other classes, or it is
            not complete.
        UnsupportedError: transformers has no such head for the architecture, or there is no
            tokenizer.
    """
    path = _float_folder(reference)
    transformers = transformers_module()
    config = _config(transformers, path)
    kind = _KINDS[reads]
    if type(config) not in getattr(transformers, kind.mapping):
        raise UnsupportedError(
            f"transformers has no head for {config.model_type!r} to classify {reads} data",
            where=str(path / CONFIG_FILE),
            hint=f"use an encoder, such as {kind.example}",
        )
    preprocessor = _preprocessor(path, reads, reference)
    names, replaced = _in_order(config, classes, path, reads)
    config.id2label = dict(enumerate(names))
    config.label2id = {name: index for index, name in enumerate(names)}
    _without_masking(config)
    model, new = _loaded(getattr(transformers, kind.classes), path, config, seed, replaced)
    if complete and new:
        raise UserInputError(f"the checkpoint has no tensor {min(new)}", where=str(path))
    inside = f"{model.base_model_prefix}."
    found = [name for name, _ in model.named_parameters()]
    head = tuple(name for name in found if name in new or not name.startswith(inside))
    example = text_example(model) if reads == TEXT else _media_example(preprocessor)
    return Source(reference, "huggingface", model.eval(), (), example, preprocessor, head=head)


def _float_folder(reference: str) -> Path:
    """The folder of an encoder in float."""
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
    return path


def _preprocessor(path: Path, reads: str, reference: str) -> Any:
    """What reads the data for the model."""
    if reads != TEXT:
        return load_media_processor(path, reads)
    tokenizer = load_tokenizer(path)
    if tokenizer is None:
        raise UnsupportedError("the model has no tokenizer to read text with", where=reference)
    return tokenizer


def _without_masking(config: Any) -> None:
    """Leave out what audio encoders do at random, in training, outside of torch's operators.

    That is SpecAugment and the skipping of layers, which a captured graph cannot hold.
    """
    for name, value in (("apply_spec_augment", False), ("layerdrop", 0.0)):
        if hasattr(config, name):
            setattr(config, name, value)


def _loaded(kind: Any, path: Path, config: Any, seed: int, replaced: bool) -> tuple[Any, set[str]]:
    """The model, and the names of the parameters that start at random values."""
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
                ignore_mismatched_sizes=replaced,
            )
    except Exception as error:  # transformers and safetensors raise exceptions of many types
        raise unreadable(path, error) from error
    wrong = {name for name, *_ in found["mismatched_keys"]}
    body = sorted(name for name in wrong if name.startswith(f"{model.base_model_prefix}."))
    if body:
        raise UserInputError(
            f"{body[0]} has another shape in the files than by config.json",
            where=str(path),
            hint="config.json belongs to another model, or was edited",
        )
    return model, set(found["missing_keys"]) | wrong


def _media_example(processor: MediaProcessor) -> dict[str, Tensor]:
    """Keyword inputs for two images or recordings."""
    values = {name: torch.from_numpy(v) for name, v in processor.example().items()}
    return {name: torch.stack([value, value]) for name, value in values.items()}


def load_media_classifier(reference: str) -> Source | None:
    """A classifier of images or audio with the head of its checkpoint; None for any other model.

    Args:
        reference: See `load_source`.

    Raises:
        UserInputError, UnsupportedError: see `load_classifier`; or a parameter is missing.
    """
    path = Path(reference)
    if not (path / CONFIG_FILE).is_file():
        return None
    named = read_object(path / CONFIG_FILE).get("architectures")
    name = str(named[0]) if isinstance(named, list) and named else ""
    kinds = [kind for kind in (IMAGE, AUDIO) if name.endswith(_KINDS[kind].endings)]
    if not kinds:
        return None
    transformers = transformers_module()
    config = _config(transformers, path)
    if type(config) not in getattr(transformers, _KINDS[kinds[0]].mapping):
        return None  # an encoder of texts
    names = [str(config.id2label[index]) for index in sorted(config.id2label)]
    return load_classifier(reference, names, reads=kinds[0], complete=True)


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


def _in_order(
    config: Any, classes: Sequence[str], path: Path, reads: str
) -> tuple[list[str], bool]:
    """The classes in the order of the logits, and whether a head for others is replaced.

    A checkpoint with a head for these classes determines the order.

    Raises:
        UserInputError: an encoder of texts has a head for other classes.
    """
    architectures = config.architectures or []
    if not any(name.endswith(_KINDS[reads].endings) for name in architectures):
        return list(classes), False
    own = [str(config.id2label[index]) for index in sorted(config.id2label)]
    if sorted(own) == sorted(classes):
        return own, False
    if reads == TEXT:
        raise UserInputError(
            f"the checkpoint's classes are {', '.join(own)}, the data's {', '.join(classes)}",
            where=str(path / CONFIG_FILE),
            hint="use the checkpoint's labels, or give the encoder without its head",
        )
    say(f"note: the checkpoint's head, for {len(own)} other classes, is replaced by a new one")
    return list(classes), True
