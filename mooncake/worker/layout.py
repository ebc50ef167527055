"""How a KV block lies in the engine's memory and in the pool.

In the engine a block is one page per layer (vLLM's layer-major layout); in the pool it is one
contiguous object: the pages of all layers in layer order. Pages are opaque bytes: the CPU kernels
pack keys and values per instruction set, so the instruction set is part of the block's name
(core.context lists what else is).
"""

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from mooncake.core.errors import ConfigError
from transfer.copy import Pages

Bytes = npt.NDArray[np.uint8]

POOL_LAYOUT = "pages-of-all-layers-1"
"""Name of this module's arrangement of an object; part of every engine's context (core.context)."""


def _as_one_array(pages: list[Bytes]) -> npt.NDArray[np.uint8] | None:
    """Return [block, layer, byte] over layers that lie at equal distances in one allocation."""
    starts = [page.__array_interface__["data"][0] for page in pages]
    steps = {after - before for before, after in itertools.pairwise(starts)}
    if (
        len({page.shape for page in pages}) > 1
        or len(steps) > 1
        or not all(p.flags.c_contiguous for p in pages)
    ):
        return None
    step = steps.pop() if steps else 0
    if step < pages[0].nbytes and len(pages) > 1:
        return None  # descending or overlapping: not an allocation in layer order
    blocks, page_bytes = pages[0].shape
    # beyond pages[0]'s own bounds, but inside memory that `pages` keeps alive: every row was given
    return np.lib.stride_tricks.as_strided(pages[0], (blocks, len(pages), page_bytes), (page_bytes, step, 1))


class PagedKv:
    """The engine's KV caches as pages: `pages[layer][block_id]` is a writable uint8 row."""

    def __init__(self, layer_names: list[str], pages: list[Bytes]) -> None:
        """`pages[i]` has shape [num_blocks, page_bytes] and belongs to `layer_names[i]`."""
        if not pages:
            raise ConfigError("the model has no KV cache: nothing to share through the pool")
        self.layer_names = layer_names
        self.layer_index = {name: index for index, name in enumerate(layer_names)}
        self.pages = pages
        self.page_bytes = [int(page.shape[1]) for page in pages]
        self.offsets = [0, *np.cumsum(self.page_bytes).tolist()]
        self.block_bytes = self.offsets[-1]
        self._blocks = _as_one_array(pages)

    @classmethod
    def of_tensors(cls, kv_caches: Mapping[str, Any]) -> "PagedKv":
        """Wrap vLLM's KV tensors without a copy.

        Args:
            kv_caches: layer name to tensor whose first dimension counts blocks.

        Raises:
            ConfigError: tensors on a device, or blocks that are not contiguous.
        """
        import torch

        names, pages = [], []
        for name, tensor in kv_caches.items():
            if tensor.device.type != "cpu":
                raise ConfigError(
                    f"KV cache of layer {name} is on {tensor.device}: this release moves blocks of CPU "
                    "engines only (GPU staging belongs to the transfer engine)"
                )
            if not tensor[0].is_contiguous():
                raise ConfigError(f"KV cache of layer {name}: blocks are not contiguous ({tensor.stride()})")
            blocks = tensor.shape[0]
            flat = tensor.view(torch.uint8) if tensor.is_contiguous() else tensor
            if not flat.is_contiguous():
                raise ConfigError(f"KV cache of layer {name}: layers are interleaved ({tensor.stride()})")
            names.append(name)
            pages.append(flat.reshape(blocks, -1).numpy())
        return cls(names, pages)

    def block_pages(self, block_id: int) -> Pages:
        """Return all layers' pages of one block: one strided array where the layout allows it.

        One array is one copy call, and so one release of the interpreter lock instead of one per
        layer: each may cost the copier a switch interval while the engine's own thread computes.
        """
        if self._blocks is not None:
            block: Bytes = self._blocks[block_id]
            return block
        return [pages[block_id] for pages in self.pages]

    def write_layer(self, layer: int, block_id: int, source: Bytes) -> None:
        """Copy one layer's page from a pool object `source` into the engine."""
        start = self.offsets[layer]
        self.pages[layer][block_id] = source[start : start + self.page_bytes[layer]]

    def read_layer(self, layer: int, block_id: int, target: Bytes) -> None:
        """Copy one layer's page from the engine into a pool object `target`."""
        start = self.offsets[layer]
        target[start : start + self.page_bytes[layer]] = self.pages[layer][block_id]
