"""OpenVINO IR: convert a legalized program with OpenVINO's own frontend, and write it.

OpenVINO's CPU plugin multiplies by a weight of unsigned codes with a *real-valued* zero-point per
group in one operator, so a folded program needs no correction and no operator library there. The
graph around the quantized layers is converted by OpenVINO's frontend for `torch.fx`; the layers are
built here, with the graph API.
"""
