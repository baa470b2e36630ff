"""The compiled engine: all sums of a pair of blocks in one pass over their raw words.

Sums run in float32 lanes that are added to float64 every `_CHUNK` words, so their rounding error does
not grow with the block. A chunk with equal bits costs one comparison and the norm of base.
`torch_engine` does the same without a compiler; `measures` defines the sums.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from affectlens.drift.measures import TINY, ControlField, Field

# Words: a chunk stays in the nearest cache, and float32 lanes keep their digits. Half as many halve the
# error of a cosine near zero, from 4e-7 at most, and cost 2 to 3 % of the time.
_CHUNK = 1024
# Not nnan, ninf: NaN and infinity must show in the sums.
_OPTIONS: dict[str, Any] = {"nogil": True, "fastmath": {"reassoc", "contract", "nsz", "arcp"}}
_ZERO, _NONE = np.float32(0), np.uint32(0)
# Plain integers, compiled in as constants: the places of the sums.
_DD, _BB, _BD, _ABSOLUTE, _STEPS, _LARGEST, _CHANGED, _SIGN_FLIPS = map(int, Field)
_CC, _CD, _CONTROL_ABSOLUTE, _CONTROL_LARGEST, _ = map(int, ControlField)
_INT, _FLOAT = ir.IntType(32), ir.FloatType()
_MAGNITUDE, _EXPONENT = 0x7FFFFFFF, 0x7F800000


def _compiled(function: Any) -> Any:
    try:
        found = njit(cache=True, **_OPTIONS)(function)
    except RuntimeError:  # no folder for the cache: compile in each process
        return njit(**_OPTIONS)(function)
    save = found._cache.save_overload

    def kept(*what: Any) -> None:
        with suppress(OSError):  # a full disk must not end the run
            save(*what)

    found._cache.save_overload = kept
    return found


@_compiled
def _still(x: Any) -> Any:
    bb = _ZERO
    for k in range(x.size):
        one, two = first(x[k]), second(x[k])
        bb += one * one + two * two
    return bb


@_compiled
def _moved(x: Any, y: Any) -> Any:
    dd = bb = bd = total = steps = _ZERO
    most = changed = flips = _NONE
    for k in range(x.size):
        b, c, t, u = first(x[k]), second(x[k]), first(y[k]), second(y[k])
        d, e = t - b, u - c
        dd += d * d + e * e
        bb += b * b + c * c
        bd += b * d + c * e
        total += absolute(d) + absolute(e)
        m, n = magnitude(d), magnitude(e)
        most = larger(most, larger(m, n))
        changed = add(changed, add(nonzero(m), nonzero(n)))
        flips = add(flips, add(flipped(b, t), flipped(c, u)))
        p, q = power_where(t, m), power_where(u, n)
        steps += p * p + q * q
    return dd, bb, bd, total, steps, most, changed, flips


@_compiled
def _equal(x: Any, y: Any) -> bool:
    if x[0] != y[0]:  # most chunks that differ do so at once
        return False
    found = differing(x[0], x[0])
    for k in range(x.size):
        found = both(found, differing(x[k], y[k]))
    return bool(found == 0)


@_compiled
def measure(sides: Any, sums: Any) -> None:
    """Add the sums of FIELDS for (base, tuned)."""
    base, tuned = sides
    for i in range(0, base.size, _CHUNK):
        x, y = base[i : i + _CHUNK], tuned[i : i + _CHUNK]
        if _equal(x, y):
            sums[_BB] += _still(x)
        else:
            dd, bb, bd, total, steps, most, changed, flips = _moved(x, y)
            sums[_DD] += dd
            sums[_BB] += bb
            sums[_BD] += bd
            sums[_ABSOLUTE] += total
            sums[_STEPS] += steps
            sums[_LARGEST] = max(sums[_LARGEST], as_float(most))
            sums[_CHANGED] += changed
            sums[_SIGN_FLIPS] += flips


@_compiled
def still(base: Any, sums: Any) -> None:
    """Add the sums of two sides known to be equal, of which one is read."""
    for i in range(0, base.size, _CHUNK):
        sums[_BB] += _still(base[i : i + _CHUNK])


@_compiled
def beside(sides: Any, sums: Any) -> None:
    """Add the sums of BESIDE for (base, tuned, control)."""
    base, tuned, control = sides
    for i in range(0, base.size, _CHUNK):
        cc, cd, total, most = _beside(base[i : i + _CHUNK], tuned[i : i + _CHUNK], control[i : i + _CHUNK])
        sums[_CC] += cc
        sums[_CD] += cd
        sums[_CONTROL_ABSOLUTE] += total
        sums[_CONTROL_LARGEST] = max(sums[_CONTROL_LARGEST], as_float(most))


@_compiled
def _beside(x: Any, y: Any, z: Any) -> Any:
    cc = cd = total = _ZERO
    most = _NONE
    for k in range(x.size):
        b, c = first(x[k]), second(x[k])
        e, f = first(z[k]) - b, second(z[k]) - c
        cc += e * e + f * f
        cd += e * (first(y[k]) - b) + f * (second(y[k]) - c)
        total += absolute(e) + absolute(f)
        most = larger(most, larger(magnitude(e), magnitude(f)))
    return cc, cd, total, most


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
    # One multiply-add and a shift: the sign bit is set where x·y < −TINY, so a zero never flips.
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


# The power of two at or below |x|: a step of its format is a fixed fraction of it. Zero where unchanged.
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
