"""Prompts of different lengths as one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Prompts:
    """Token ids int64 ``[batch, length]``, the real ones first in each row, ``counts`` of them."""

    ids: torch.Tensor
    counts: torch.Tensor

    @classmethod
    def of(
        cls,
        input_ids: torch.Tensor | Sequence[Sequence[int] | torch.Tensor],
        attention_mask: torch.Tensor | None = None,
    ) -> Prompts:
        """From a tensor, padded on either side with the mask saying where, or from rows.

        Raises:
            TypeError, ValueError: what is wrong with the ids or the mask.
        """
        if not isinstance(input_ids, torch.Tensor):
            rows = [torch.as_tensor(row) for row in input_ids]
            if attention_mask is not None:
                raise ValueError("attention_mask is for a padded tensor; rows have their lengths")
            return cls._of_rows(rows)
        if input_ids.dim() != 2:
            raise ValueError(
                f"input_ids has shape {tuple(input_ids.shape)}; it must be [batch, length]"
            )
        if attention_mask is None:
            return cls._of_rows(list(input_ids))
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}, input_ids "
                f"{tuple(input_ids.shape)}; they must be equal"
            )
        real = attention_mask.bool()
        edges = real.int().diff(dim=1, prepend=real.new_zeros(len(real), 1).int())
        if bool(((edges == 1).sum(1) > 1).any()):
            raise ValueError("attention_mask leaves out tokens between others; mask only padding")
        return cls._of_rows([row[kept] for row, kept in zip(input_ids, real, strict=True)])

    @classmethod
    def _of_rows(cls, rows: Sequence[torch.Tensor]) -> Prompts:
        if not rows:
            raise ValueError("there is no prompt; pass at least one row of token ids")
        for number, row in enumerate(rows):
            if row.dim() != 1 or row.numel() == 0:
                raise ValueError(
                    f"prompt {number} has shape {tuple(row.shape)}; it must be a row of at least "
                    "one token id"
                )
            if row.dtype not in (torch.int64, torch.int32):
                raise TypeError(f"prompt {number} is {row.dtype}; token ids are int64")
        counts = torch.tensor([len(row) for row in rows])
        ids = torch.zeros(len(rows), int(counts.max()), dtype=torch.int64)
        for row, target in zip(rows, ids, strict=True):
            target[: len(row)] = row
        return cls(ids, counts)
