"""The commands, each a module of `qalora_compile.cli`, with the line that says what it does."""

from __future__ import annotations

from collections.abc import Mapping

COMMANDS: Mapping[str, str] = {
    "finetune": "train adapters on a model's own quantized weights; writes a RUN folder",
    "adapt": "quantize a model and import adapters trained by PEFT; writes a RUN folder",
    "fold": "fold the trained adapters of a RUN into its zero-points, and check that nothing "
    "changed",
    "export": "write a folded model as ONNX, for OpenVINO, torch or Core ML, or as a checkpoint",
    "quantize": "quantize a model of any size into an edge folder, without training",
    "verify": "compare two programs or exported models; exit 0 equal or proved, 1 different, 2 not "
    "comparable, 3 in part only sampled",
    "bisect": "find the first pass, site and node that changes what a program computes",
    "inspect": "show what was quantized, how, and why",
    "generate": "continue a prompt with an exported model, greedily or by sampling",
    "chat": "talk with an exported language model; answers appear as they are generated",
    "serve": "serve an exported model with the OpenAI API, for chats, texts or embeddings",
    "eval": "perplexity, exact match or accuracy of models of any form, on the same data",
    "bench": "speed and memory of an exported language model, compared with its unmerged and "
    "float forms",
    "diff": "write what a fine-tuning changed in an edge folder: a few tensors instead of a model",
    "apply": "write a tuned edge folder again, bit for bit, from its base and a patch of diff",
    "doctor": "show versions, CPU features and which kernels will run",
    "completion": "print the completion script of a shell",
}
"""Name → summary. Nothing else has to be imported to list or to suggest a command."""
