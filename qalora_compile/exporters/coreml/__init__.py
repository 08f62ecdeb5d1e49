"""Core ML: convert a legalized program with coremltools, and write an `.mlpackage`.

Core ML has a constant of codes with a *real-valued* offset per block, so a folded program needs no
correction there. coremltools converts the graph around the quantized layers; the layers are built
here. Core ML itself runs on Apple devices alone: what is written is read again and compared.
"""
