"""Cached decoding: keys and values of many rows of unequal lengths, and attention over them.

Row r holds its tokens in slots 0..length-1, so a token's slot is its position; rows need no padding on the left, can be dropped, and new
rows can join at any time. Prompts are prefilled packed, end to end, and their keys and values are written into the rows straight from
the model's layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

BLOCK = 64
"""Slots by which the rows grow: one copy of the cache in this many steps."""


class DecodeLayout:
    """Which slots the one new token of each row attends to.

    `positions` [B] are the slots of the new tokens; `shortest` and `longest` bound the live rows' on the host (no sync).
    """

    def __init__(self, positions: torch.Tensor, shortest: int, longest: int) -> None:
        self.positions, self.shortest, self.longest = positions, shortest, longest
        self._masks: dict[int | None, torch.Tensor | None] = {}

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        scale: float | None,
        window: int | None = None,
        softcap: float | None = None,
        dropout: float = 0.0,
    ) -> torch.Tensor:
        """q [B, H, 1, D] against k, v [B, Hkv, longest+1, D] -> [B, 1, H, Dv].

        A window of W sees the token itself and the W-1 before it. The query heads that share a key head become that head's
        queries, so that keys are never repeated (grouped-query attention, Ainslie et al. 2023, arXiv 2305.13245).
        """
        rows, heads, _, dim = q.shape
        if window is not None:  # slots that no row's window reaches are not read
            first = max(0, self.shortest - window + 1)
            k, v = k[:, :, first:], v[:, :, first:]
        mask = self._mask(window)
        q = q.to(k.dtype).reshape(rows, k.shape[1], heads // k.shape[1], dim)
        if softcap is None:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)
        else:
            scores = q @ k.transpose(2, 3) * (dim**-0.5 if scale is None else scale)
            scores = softcap * torch.tanh(scores / softcap)
            if mask is not None:
                scores = scores.masked_fill(~mask, float("-inf"))
            weights = torch.softmax(scores, -1, dtype=torch.promote_types(scores.dtype, torch.float32))
            out = F.dropout(weights.to(v.dtype), dropout) @ v
        return out.reshape(rows, 1, heads, out.shape[-1])

    def _mask(self, window: int | None) -> torch.Tensor | None:
        """[B, 1, 1, slots] bool, one for all layers with the same window; None when every live row sees every slot that is read."""
        if self.shortest == self.longest:
            return None
        if window not in self._masks:
            first = 0 if window is None else max(0, self.shortest - window + 1)
            slots = torch.arange(first, self.longest + 1, device=self.positions.device)
            ends = self.positions[:, None]
            mask = slots <= ends
            if window is not None:
                mask &= slots > ends - window
            self._masks[window] = mask[:, None, None]
        return self._masks[window]


class DecodeCache:
    """The `past_key_values` of a decoding model: [rows, key heads, capacity, head dim] a layer, grown with the real lengths.

    Layers are allocated when they first write, in the type that attention reads (the autocast type inside autocast).
    Slots are zero before they are written: what a mask hides must still be finite, for 0 * NaN is NaN.
    """

    is_compileable = False

    def __init__(self) -> None:
        self.rows = self.capacity = 0
        self.keys: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}
        self._prefill: tuple[int, torch.Tensor] | None = None
        self._decode: tuple[torch.Tensor, torch.Tensor, int] | None = None

    def resize(self, keep: Sequence[int], extra: int, capacity: int) -> None:
        """Keeps these rows, in this order, adds `extra` empty ones behind them and gives all of them `capacity` slots."""
        copied, rows = min(self.capacity, capacity), len(keep) + extra
        everything = len(keep) == self.rows
        for store in (self.keys, self.values):
            for layer, old in store.items():
                old = old[:, :, :copied]
                if not everything:
                    old = old.index_select(0, torch.tensor(keep, device=old.device, dtype=torch.int64))
                if extra or capacity > copied:
                    new = old.new_zeros(rows, old.shape[1], capacity, old.shape[3])
                    new[: len(keep), :, :copied] = old
                    old = new
                store[layer] = old
        self.rows, self.capacity = rows, capacity

    def begin_prefill(self, first_row: int, source: torch.Tensor) -> None:
        """The next forward is packed prompts; row `first_row + r` takes its slot s from packed token `source[r, s]`."""
        self._prefill, self._decode = (first_row, source), None

    def begin_decode(self, positions: torch.Tensor, longest: int) -> None:
        """The next forward is one token a row, to be written at `positions` [rows] and read up to slot `longest`."""
        self._prefill = None
        self._decode = (torch.arange(self.rows, device=positions.device), positions, longest + 1)

    def update(
        self, k: torch.Tensor, v: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Called by the model's layers: stores the new keys and values, returns what to attend to."""
        if layer_idx not in self.keys:
            device = v.device.type  # rotary embeddings or norms may have widened the keys alone
            dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else v.dtype
            self.keys[layer_idx], self.values[layer_idx] = self._allocate(k, dtype), self._allocate(v, dtype)
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        if self._prefill is not None:
            first, source = self._prefill
            for store, new in ((keys, k), (values, v)):
                rows = new[0].to(store.dtype).index_select(1, source.flatten()).unflatten(1, source.shape)
                store[first : first + len(source), :, : source.shape[1]] = rows.transpose(0, 1)
            return k, v
        assert self._decode is not None
        index, positions, span = self._decode
        keys[index, :, positions] = k[:, :, 0].to(keys.dtype)
        values[index, :, positions] = v[:, :, 0].to(values.dtype)
        return keys[:, :, :span], values[:, :, :span]

    def _allocate(self, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return like.new_zeros(self.rows, like.shape[1], self.capacity, like.shape[3], dtype=dtype)

    # What transformers asks of a cache. Positions are always passed and masks are made by the layout, so neither depends on these.
    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[int, int]:
        return (query_length if isinstance(query_length, int) else len(query_length)), 0
