"""Classes of the library that the contract is not run on, each with the reason."""

from __future__ import annotations

NOT_RUN: dict[str, str] = {
    "MiniMaxMusic3RVQDepthDecoder": "decodes the codebooks of one audio frame one after another: it denoises nothing",
    "WanAnimate2Transformer3DModel": "reads a cache that a first pass has filled, and breaks the graph with "
    "`reference_grid[0][axis].item()`",
}
