"""What a language model says about its own text: how long it gets, and where it ends."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from sparsify.artefact.container import ArtefactError, check_fields


@dataclass(frozen=True)
class TextSettings:
    """What a model says about its own text.

    Attributes:
        max_positions: longest sequence that the model was made for.
        eos_token_ids: tokens that end a sequence.
        pad_token_id: stands after the end in the rows of a batch.
        config: the model's configuration as transformers writes it, for its own ``generate``.
    """

    max_positions: int
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int = 0
    config: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, model: Any) -> TextSettings:
        """What a model of transformers says of itself."""
        chosen, config = model.generation_config, model.config
        ends = chosen.eos_token_id if chosen.eos_token_id is not None else config.eos_token_id
        ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        pad = chosen.pad_token_id if chosen.pad_token_id is not None else config.pad_token_id
        record = json.loads(config.to_json_string(use_diff=False))
        return cls(
            config.get_text_config().max_position_embeddings,
            tuple(ends),
            pad if pad is not None else ends[0] if ends else 0,
            record,
        )

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "eos_token_ids": list(self.eos_token_ids)}

    @classmethod
    def from_dict(cls, record: Any) -> TextSettings:
        """What `to_dict` made.

        Raises:
            ArtefactError: naming the field that is missing, unknown or of another type.
        """
        kinds = {"max_positions": int, "eos_token_ids": list, "pad_token_id": int, "config": dict}
        check_fields(record, kinds, "the record of text settings")
        ends = record["eos_token_ids"]
        unknown = [name for name in record if name not in kinds]
        if unknown:
            raise ArtefactError(f"the record of text settings has an unknown field {unknown[0]!r}")
        if not all(isinstance(end, int) for end in ends):
            raise ArtefactError(f"the field 'eos_token_ids' of the text settings is {ends!r}")
        return cls(**{**record, "eos_token_ids": tuple(ends)})
