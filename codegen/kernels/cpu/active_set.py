"""Which features are not zero in all tokens of a call: their numbers, in order, found at run time.

for vector of features:
  bits = or over tokens of |x[token, features]|
  list[count:] = numbers of the features whose bits are not zero; count += how many
"""

from __future__ import annotations

from tvm.tirx.script.builder import ir as T

from sparsify.codegen.isa import Isa
from sparsify.codegen.kernels.cpu.rows import ragged_load
from sparsify.codegen.kernels.cpu.simd import Expr, bind, i64, intrinsic, load, store

_MAGNITUDE = 0x7FFFFFFF
"""All bits of a float but its sign: zeros of either sign are zero."""


class ActiveSet:
    """The list, and room for ``spare`` entries behind it.

    Emits its making where it is constructed, which is before a kernel's tasks: they all read it.

    Attributes:
        count: how many features are active.
    """

    def __init__(
        self, isa: Isa, x: Expr, tokens: Expr, features: Expr | int, known: bool, spare: int
    ) -> None:
        """Args:
        x: ``[tokens, features]``.
        known: whether ``features`` is a number already; else they are whole vectors.
        """
        self.isa, self.x, self.tokens, self.features = isa, x, tokens, features
        width = isa.vector
        # A store of a whole vector may go past the last entry.
        self._list = T.alloc_buffer((features + max(width, spare),), "int32", scope="local")
        self._counter = T.alloc_buffer((1,), "int64", scope="global")
        T.buffer_store(self._counter, T.int64(0), [0])
        whole = T.int64(features // width) if known else T.floordiv(features, width)
        with T.serial(whole) as step:
            self._append(bind(step * width), width)
        if known and isinstance(features, int) and (left := features % width):
            self._append(T.int64(features - left), left)
        self.count = bind(self._counter[0])

    def __getitem__(self, place: Expr) -> Expr:
        """A feature's number."""
        return i64(self._list[place])

    def wrap(self, spare: int) -> None:
        """Lets entries behind the last be the first ones again."""
        with T.serial(T.int64(spare)) as i:
            store(self._list, self.count + i, self._list[i], 1)

    def _append(self, first: Expr, features: int) -> None:
        width, lanes = self.isa.vector, f"int32x{self.isa.vector}"
        bits = T.alloc_buffer((width,), "int32", scope="global")
        store(bits, 0, T.Broadcast(T.int32(0), width), width)
        with T.serial(self.tokens) as token:
            at = bind(token * self.features + first)
            value = T.reinterpret(lanes, ragged_load(self.x, at, features, width))
            store(bits, 0, T.bitwise_or(load(bits, 0, width), value), width)
        magnitude = T.Broadcast(T.int32(_MAGNITUDE), width)
        seen = bind(T.bitwise_and(load(bits, 0, width), magnitude))
        if self.isa.name == "avx512":
            count = bind(self._counter[0])
            chosen = seen != T.Broadcast(T.int32(0), width)
            numbers = T.Ramp(T.Cast("int32", first), 1, width)
            name, nothing = "llvm.x86.avx512.mask.compress", T.Broadcast(T.int32(0), width)
            store(self._list, count, intrinsic(lanes, name, numbers, nothing, chosen), width)
            ones = T.Select(chosen, T.Broadcast(T.int32(1), width), nothing)
            found = intrinsic("int32", "llvm.vector.reduce.add", ones)
            T.buffer_store(self._counter, count + i64(found), [0])
            return
        for lane in range(features):
            at = bind(self._counter[0])
            store(self._list, at, T.Cast("int32", first + lane), 1)
            here = T.Shuffle([seen], [lane])
            T.buffer_store(self._counter, at + T.Cast("int64", here != 0), [0])
