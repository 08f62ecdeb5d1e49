"""A tiny Hugging Face language model with a tokenizer, and data for it, as files."""

from __future__ import annotations

import json
from pathlib import Path

import torch

WORDS = ["red", "green", "blue", "one", "two", "three", "is", "a", "colour", "number", ":"]

GOOD, BAD = ["fine", "great", "lovely"], ["awful", "dull", "poor"]
FILLER = ["the", "film", "is", "so", "and", "very"]


def write_model(folder: Path, *, layers: int = 2) -> Path:
    """Write a Llama as a folder of config, safetensors and tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(["<unk>", "<end>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def write_data(path: Path) -> Path:
    """Write words and their kind."""
    rows = [
        {"prompt": f"{word} is a", "completion": f" {kind}"}
        for kind, words in (("colour", WORDS[:3]), ("number", WORDS[3:6]))
        for word in words
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def write_encoder(folder: Path) -> Path:
    """Write a BERT encoder of one layer, without a head, as a folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *GOOD, *BAD, *FILLER]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", sep_token="[SEP]"
    ).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=32,
        initializer_range=0.2,  # so that the words differ from the start
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)
    return folder
