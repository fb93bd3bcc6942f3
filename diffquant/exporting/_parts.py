"""The canonical parts of a plan's pieces, encoded where they are yet to be."""

from dataclasses import replace

import torch
from torch import Tensor

from diffquant.errors import FormatError
from diffquant.pieces import canonical
from diffquant.plan import Piece, Plan, Recode, Role
from diffquant.recode import Encoder, sketched
from diffquant.tensors import Weights

#: The path of a layer and which of its pieces.
Member = tuple[str, int]


class Shapes(Weights):
    """The same tensors without data, so that shapes come from the very code that makes bytes."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights

    def tensor(self, file: int, name: str) -> Tensor:
        return torch.empty_like(self._weights.tensor(file, name), device="meta")


def pieces_of(plan: Plan) -> dict[Member, Piece]:
    return {
        (layer.path, index): piece
        for layer in plan.layers
        for index, piece in enumerate(layer.pieces)
    }


class Parts:
    """Canonical parts of a plan's pieces. A recoded piece is encoded once, while its parts are asked
    for in a row."""

    def __init__(self, plan: Plan, weights: Weights) -> None:
        self.weights = weights
        self._encoder = Encoder(plan, weights)
        self._pieces = pieces_of(plan)
        self._encoded: dict[Member, dict[Role, Tensor]] = {}

    def piece(self, member: Member) -> Piece:
        return self._pieces[member]

    def has(self, member: Member, role: Role) -> bool:
        piece = self.piece(member)
        made = frozenset[Role]() if piece.recode is None else piece.recode.roles
        return role in made or piece.part(role) is not None

    def get(self, member: Member, role: Role) -> Tensor | None:
        """The part with the axes of `plan.Role`, None when the piece has none."""
        if not self.has(member, role):
            return None
        piece = self.piece(member)
        if piece.recode is not None and role in piece.recode.roles:
            return self._made(member, piece)[role]
        alone = replace(piece, parts=tuple(part for part in piece.parts if part.role is role))
        if role is Role.BLOCK_SCALE and piece.take:
            self._require_rows(member, alone)
        return canonical(alone, self.weights)[role]

    def share(self, one: Member, other: Member, role: Role) -> bool:
        """Whether both pieces have the same part; of parts yet to be made, whether they will."""
        recodes = [self.piece(member).recode for member in (one, other)]
        if any(recode is not None and role in recode.roles for recode in recodes):
            keys = {None if recode is None else _shared(recode, role) for recode in recodes}
            return len(keys) == 1 and None not in keys
        if self.piece(one).part(role) == self.piece(other).part(role):
            return True
        first, second = self.get(one, role), self.get(other, role)
        return first is not None and second is not None and torch.equal(first, second)

    def _made(self, member: Member, piece: Piece) -> dict[Role, Tensor]:
        if member not in self._encoded:
            if isinstance(self.weights, Shapes):
                made = sketched(piece)
            else:
                made = self._encoder.parts(piece, canonical(piece, self.weights))
            self._encoded = {member: made}
        return self._encoded[member]

    def _require_rows(self, member: Member, alone: Piece) -> None:
        """Blocks of rows cannot be cut between their rows."""
        whole = canonical(replace(alone, take=()), self.weights)[Role.BLOCK_SCALE]
        if whole.shape[0] != alone.stored_NK[0]:
            raise FormatError(
                f"{member[0]!r} is cut from a weight in blocks of "
                f"{alone.stored_NK[0] // whole.shape[0]} rows, which cannot be stored alone"
            )


def _shared(recode: Recode, role: Role) -> str | None:
    """The key of what makes a part that has no rows; siblings with one key have one such part."""
    keys = {Role.TENSOR_SCALE: recode.shared_amax, Role.INPUT_SCALE: str(recode.input_amax)}
    return keys.get(role, recode.fused)
