"""Method `learned`: codes from GPTQ, then all scales and offsets trained together.

It is a quantizer that is a training, so it lives here and uses this package's schedule, clipping,
chunked logits and checkpoints; `quantizers` knows it only by its name in the registry.
"""
