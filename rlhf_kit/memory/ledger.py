"""Counts the bytes of every tensor that is alive, part by part, while code runs on torch's meta device.

Meta tensors have shapes and dtypes but no data, so a training step of a model of any size runs in seconds and in next
to no memory, and what autograd saves, recomputes and frees is what it would save, recompute and free on a GPU.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Every part of an estimate, in the order of its table; the first ones are held from beginning to end.
STATIC = ("base", "reference", "value model", "reward models", "adapters", "heads", "optimizer")
DYNAMIC = ("gradients", "KV cache", "activations", "logits", "dequantisation")

aten = torch.ops.aten


class Ledger(TorchDispatchMode):
    """The bytes alive now and at the peak, by part, of what is held from the start and of what operations make.

    vocab_sizes: a float tensor whose last dimension is one of these counts as logits. longest: tokens of the longest
    row, for code that asks; meta tensors cannot answer.
    """

    def __init__(self, vocab_sizes: Iterable[int] = (), longest: int = 1) -> None:
        super().__init__()
        self.longest = longest
        self.padded = False  # what code that asks "is any position padding?" is told: meta tensors cannot answer
        self.vocab_sizes = set(vocab_sizes)
        self.live = dict.fromkeys((*STATIC, *DYNAMIC), 0)
        self.peak = dict(self.live)
        self._storages: dict[int, tuple[weakref.ref[Any], str]] = {}

    def hold(self, part: str, tensors: Iterable[torch.Tensor]) -> None:
        """Count tensors under `part`, whatever they counted under before; a storage shared by several counts once."""
        for tensor in tensors:
            self._enter(tensor, part, move=True)
        self._note_peak()

    @contextmanager
    def phase(self, rows: int) -> Iterator[dict[str, int]]:
        """Bytes by part at the peak of the block, known when it ends; more than one of `rows` means padding."""
        self.padded = rows > 1
        self.peak = dict(self.live)
        at_peak: dict[str, int] = {}
        with self:
            yield at_peak
        at_peak.update(self.peak)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        on_meta = bool(args) and isinstance(args[0], torch.Tensor) and args[0].is_meta
        if on_meta and func is aten._local_scalar_dense.default:
            return not self.padded if args[0].dtype == torch.bool else self.longest
        if on_meta and func is aten.index.Tensor:
            args = (args[0], _all_selected(args[1]))
        out = func(*args, **(kwargs or {}))
        part = "dequantisation" if "dequantize" in func.name() else None
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._enter(tensor, part or self._part(tensor))
        if func is torch.ops.bitsandbytes.gemm_4bit.default and on_meta:
            # The weight is written out inside the kernel, with its fp32 block scales, before and after the offset.
            weights, block = args[2][0] * args[2][1], args[4]
            self._note_peak(weights * args[0].element_size() + 2 * 4 * weights // block)
        self._note_peak()
        return out

    def _part(self, tensor: torch.Tensor) -> str:
        is_logits = tensor.dim() > 1 and tensor.is_floating_point() and tensor.shape[-1] in self.vocab_sizes
        return "logits" if is_logits else "activations"

    def _enter(self, tensor: torch.Tensor, part: str, move: bool = False) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            if move:
                reference, before = self._storages[key]
                self.live[before] -= size
                self.live[part] += size
                self._storages[key] = reference, part
            return

        def gone(_: object) -> None:
            _, part = self._storages.pop(key)
            self.live[part] -= size

        self._storages[key] = weakref.ref(storage, gone), part
        self.live[part] += size

    def _note_peak(self, dequantisation: int = 0) -> None:
        if sum(self.live.values()) + dequantisation > sum(self.peak.values()):
            self.peak = {**self.live, "dequantisation": self.live["dequantisation"] + dequantisation}


@contextmanager
def fused_attention(on_gpu: bool) -> Iterator[None]:
    """Make attention keep on the meta device what it keeps on a GPU or a CPU: no attention matrix, but for one case.

    For meta tensors torch would choose plain matrix products. Elsewhere it does so for fp32 on a GPU with fewer key
    heads than query heads: of its fused kernels some take no fp32 there, and the others no grouped heads.
    """
    plain = F.scaled_dot_product_attention

    def attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        grouped_fp32 = on_gpu and query.dtype == torch.float32 and query.shape[1] != key.shape[1]
        if not query.is_meta or grouped_fp32:
            return plain(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)  # the kernels add a mask to the scores
        fused = aten._scaled_dot_product_flash_attention_for_cpu
        return fused(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]

    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain


def _all_selected(indices: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """A mask as index selects an unknown number of rows of a meta tensor: count all of them."""
    selected: list[torch.Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype == torch.bool:
            selected += [torch.empty(index.numel(), dtype=torch.long, device="meta") for _ in range(index.dim())]
        else:
            selected.append(index)
    return selected
