"""An embedding table of which only the rows that training texts use learn.

A corpus uses a few thousand of a vocabulary's tens of thousands of sub-words. Learning just those
rows spares the gradient, its norm, the optimiser's moments, what workers exchange and what
checkpoints store for all others, and leaves these exactly as they were pretrained.

Shapes: V vocabulary, R rows that learn, H hidden units.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn


class RowsEmbedding(nn.Module):
    """Behaves as the table it was made from, `state_dict` included; `weight` (R, H) is what learns.

    The table's padding row gets no gradient in PyTorch and so is never among the rows.
    """

    fixed: Tensor
    rows: Tensor
    places: Tensor

    def __init__(self, table: nn.Embedding, token_ids: NDArray[np.int32]) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = table.weight.shape
        self.padding_idx = table.padding_idx
        whole = table.weight.detach()
        rows = torch.from_numpy(np.unique(token_ids).astype(np.int64)).to(whole.device)
        if table.padding_idx is not None:
            rows = rows[rows != table.padding_idx]
        places = torch.full((len(whole),), -1, device=whole.device)
        places[rows] = torch.arange(len(rows), device=whole.device)
        self.weight = nn.Parameter(whole[rows])
        for name, tensor in (("fixed", whole), ("rows", rows), ("places", places)):
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        """(…) token ids → (…, H)."""
        places = self.places[input]
        learned = F.embedding(places.clamp(min=0), self.weight)
        return torch.where((places < 0).unsqueeze(-1), F.embedding(input, self.fixed), learned)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, learning={len(self.rows)}"

    def whole(self) -> Tensor:
        """(V, H) the table as it stands."""
        return self.fixed.index_copy(0, self.rows, self.weight.detach())

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.whole()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *details: Any) -> None:
        whole = state_dict[prefix + "weight"]
        with torch.no_grad():
            self.fixed.copy_(whole)
            self.weight.copy_(whole[self.rows])


def learn_rows(transformer: Any, token_ids: NDArray[np.int32]) -> None:
    """Let only these tokens' embeddings learn; to be called before an optimiser is made.

    A table that does more than look up, as Gemma's, which scales, learns as a whole.
    """
    table = transformer.get_input_embeddings()
    if type(table) is not nn.Embedding:
        return
    transformer.set_input_embeddings(RowsEmbedding(table, token_ids))


def fixed_table(transformer: Any) -> dict[str, Tensor]:
    """The whole table as `learn_rows` found it, by name and without a copy; none without it."""
    table = transformer.get_input_embeddings()
    if not isinstance(table, RowsEmbedding):
        return {}
    return {"fixed_table": table.fixed}


def learned_rows(transformer: Any) -> str | None:
    """Fingerprint of the rows that `learn_rows` chose; a checkpoint fits no others."""
    table = transformer.get_input_embeddings()
    if not isinstance(table, RowsEmbedding):
        return None
    return hashlib.sha256(table.rows.cpu().numpy().tobytes()).hexdigest()[:32]
