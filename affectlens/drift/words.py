"""Instructions that numba has no words for: two numbers out of a machine word, and 32-bit integers.

Numba widens integers to 64 bits, which halves the lanes of a vector. Two values are taken from a word at
a time: of a `uint32` two bfloat16, of an `int32` two float16, of a `uint64` two float32.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from affectlens.drift.sums import TINY

_INT, _FLOAT = ir.IntType(32), ir.FloatType()
_MAGNITUDE, _EXPONENT = 0x7FFFFFFF, 0x7F800000


def _constant(value: int, width: int = 32) -> Any:
    return ir.Constant(ir.IntType(width), value)


def _unary(emit: Callable[..., Any], result: Any) -> Any:
    def _typed(context: Any, x: Any) -> Any:
        return result(x), lambda _, builder, signature, values: emit(builder, values[0])

    return intrinsic(_typed)


def _binary(emit: Callable[..., Any], result: Any = None) -> Any:
    def _typed(context: Any, x: Any, y: Any) -> Any:
        if x != y:
            return None
        return (result or x)(x, y), lambda _, builder, signature, values: emit(builder, *values)

    return intrinsic(_typed)


def _half(b: Any, word: Any) -> Any:
    return b.fpext(b.bitcast(b.trunc(word, ir.IntType(16)), ir.HalfType()), _FLOAT)


def _first(context: Any, w: Any) -> Any:
    emit = {
        types.uint32: lambda b, x: b.bitcast(b.shl(x, _constant(16)), _FLOAT),
        types.int32: _half,
        types.uint64: lambda b, x: b.bitcast(b.trunc(x, _INT), _FLOAT),
    }[w]
    return types.float32(w), lambda _, builder, signature, values: emit(builder, values[0])


def _second(context: Any, w: Any) -> Any:
    emit = {
        types.uint32: lambda b, x: b.bitcast(b.and_(x, _constant(0xFFFF0000)), _FLOAT),
        types.int32: lambda b, x: _half(b, b.lshr(x, _constant(16))),
        types.uint64: lambda b, x: b.bitcast(b.trunc(b.lshr(x, _constant(32, 64)), _INT), _FLOAT),
    }[w]
    return types.float32(w), lambda _, builder, signature, values: emit(builder, values[0])


def _flipped(b: Any, x: Any, y: Any) -> Any:
    # One multiply-add and a shift: the sign bit is left where x·y < −TINY, and a zero has none to flip.
    product = b.fadd(b.fmul(x, y, flags=("contract",)), ir.Constant(_FLOAT, TINY), flags=("contract",))
    return b.lshr(b.bitcast(product, _INT), _constant(31))


def _power_where(context: Any, x: Any, changed: Any) -> Any:
    def emit(b: Any, values: Any) -> Any:
        bits = b.and_(b.bitcast(values[0], _INT), _constant(_EXPONENT))
        moved = b.icmp_unsigned("!=", values[1], _constant(0))
        return b.bitcast(b.select(moved, bits, _constant(0)), _FLOAT)

    return types.float32(x, changed), lambda _, builder, signature, values: emit(builder, values)


first: Any = intrinsic(_first)
second: Any = intrinsic(_second)
# The power of two at or below |x|, of which a step of its format is a fixed fraction; zero where unchanged.
power_where: Any = intrinsic(_power_where)
flipped = _binary(_flipped, types.uint32)
magnitude = _unary(lambda b, x: b.and_(b.bitcast(x, _INT), _constant(_MAGNITUDE)), types.uint32)
absolute = _unary(
    lambda b, x: b.bitcast(b.and_(b.bitcast(x, _INT), _constant(_MAGNITUDE)), _FLOAT), types.float32
)
as_float = _unary(lambda b, w: b.bitcast(w, _FLOAT), types.float32)
nonzero = _unary(lambda b, w: b.zext(b.icmp_unsigned("!=", w, _constant(0)), _INT), types.uint32)
add = _binary(lambda b, x, y: b.add(x, y))
both = _binary(lambda b, x, y: b.or_(x, y))
differing = _binary(lambda b, x, y: b.xor(x, y))
larger = _binary(lambda b, x, y: b.select(b.icmp_unsigned(">", x, y), x, y))
