"""Vectors of 64 bytes for Numba: a type, its operators, and what loads, stores and reduces it.

LLVM splits a vector into what the processor has (AVX-512: one register, AVX2: two, NEON: four), so the same code is packed
instructions everywhere, and which ones does not depend on what an automatic vectoriser makes of a loop.

An array's dtype says how its elements are stored, and vectors of it hold the type that one computes in: float32 and float64
as they are, uint16 for bfloat16 and int16 for float16 (torch's bits), both as float32.
"""

import functools
import operator

from llvmlite import ir
from numba.core import cgutils, config, types
from numba.core.codegen import get_host_cpu_features
from numba.core.datamodel import models
from numba.core.extending import intrinsic, lower_builtin, register_model, type_callable

from diffmax.kernels.numba.parts import part

BYTES = 64

CONTRACT = ("contract",)  # a * b + c may be one fused multiply-add, where the processor has it


class Vector(types.Type):
    """`width` floats, integers of the same size, or booleans (a mask)."""

    def __init__(self, element, width):
        self.element, self.width = element, width
        super().__init__(name=f"vector({element} x {width})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, _llvm(fe_type))


def _llvm(t):
    if isinstance(t, Vector):
        return ir.VectorType(_llvm(t.element), t.width)
    if t == types.boolean:
        return ir.IntType(1)
    if isinstance(t, types.Integer):
        return ir.IntType(t.bitwidth)
    return ir.DoubleType() if t == types.float64 else ir.FloatType()


def _vector_of(array):
    element = types.float64 if array.dtype == types.float64 else types.float32
    return Vector(element, BYTES * 8 // element.bitwidth)


def _mask_of(vector):
    return Vector(types.boolean, vector.width)


def _is_float_vector(t):
    return isinstance(t, Vector) and isinstance(t.element, types.Float)


def _splat(builder, value, vector):
    """A scalar of the vector's element type in every place."""
    llvm = _llvm(vector)
    single = builder.insert_element(ir.Constant(llvm, ir.Undefined), value, ir.IntType(32)(0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), vector.width), [0] * vector.width)
    return builder.shuffle_vector(single, ir.Constant(llvm, ir.Undefined), zeros)


def has_avx512():
    """Whether Numba compiles for AVX-512, with its instructions for exponents and look-ups, which LLVM's own vectors lack."""
    features = get_host_cpu_features() if config.CPU_FEATURES is None else config.CPU_FEATURES
    return {"+avx512f", "+avx512dq"} <= set(features.split(","))


def digit_bits():
    """Bits of a number that `digit_of` looks up in a table of as many places; 0: the processor has no instruction for it."""
    features = set((get_host_cpu_features() if config.CPU_FEATURES is None else config.CPU_FEATURES).split(","))
    return 4 if has_avx512() else 3 if "+avx2" in features else 0


def _avx512(builder, name, *arguments):
    """llvm.x86.avx512.mask.<name> of whole vectors; numbers among the arguments are written into the instruction."""
    vector, kind = arguments[0].type, "pd" if isinstance(arguments[0].type.element, ir.DoubleType) else "ps"
    word, mask = ir.IntType(32), ir.IntType(vector.count)
    given = [word(a) if isinstance(a, int) else a for a in arguments]
    given += [ir.Constant(vector, ir.Undefined), mask(-1), word(4)]  # 4: the rounding that is set
    function_type = ir.FunctionType(vector, [a.type for a in given])
    function = cgutils.get_or_insert_function(builder.module, function_type, f"llvm.x86.avx512.mask.{name}.{kind}.512")
    return builder.call(function, given)


# operators


def _common(a, b):
    """The vector type of `a op b`, of which one may be a number; None if neither is a vector of floats."""
    if _is_float_vector(a) and (a == b or isinstance(b, types.Number)):
        return a
    return b if _is_float_vector(b) and isinstance(a, types.Number) else None


def _as_vector(context, builder, value, source, vector):
    if source == vector:
        return value
    return _splat(builder, context.cast(builder, value, types.unliteral(source), vector.element), vector)


def _define_binary(symbol, emit, is_comparison=False):
    """`a op b` of vectors, or of a vector and a number, as instructions in place: a function would be compiled by itself."""

    @type_callable(symbol)
    def type_of(context):
        def typer(a, b):
            vector = _common(a, b)
            return _mask_of(vector) if is_comparison and vector is not None else vector

        return typer

    def generate(context, builder, signature, arguments):
        vector = _common(*signature.args)
        return emit(builder, *_both(context, builder, signature.args, arguments, vector))

    for kinds in ((Vector, Vector), (Vector, types.Number), (types.Number, Vector)):
        lower_builtin(symbol, *kinds)(generate)


def _both(context, builder, sources, arguments, vector):
    return [_as_vector(context, builder, value, source, vector) for value, source in zip(arguments, sources, strict=True)]


_define_binary(operator.add, lambda b, x, y: b.fadd(x, y, flags=CONTRACT))
_define_binary(operator.sub, lambda b, x, y: b.fsub(x, y, flags=CONTRACT))
_define_binary(operator.mul, lambda b, x, y: b.fmul(x, y, flags=CONTRACT))
_define_binary(operator.truediv, lambda b, x, y: b.fdiv(x, y))
# NaN compares false
_define_binary(operator.gt, lambda b, x, y: b.fcmp_ordered(">", x, y), is_comparison=True)
_define_binary(operator.lt, lambda b, x, y: b.fcmp_ordered("<", x, y), is_comparison=True)
_define_binary(operator.le, lambda b, x, y: b.fcmp_ordered("<=", x, y), is_comparison=True)


def _define_mask_binary(symbol, emit):
    @type_callable(symbol)
    def type_of(context):
        return lambda a, b: a if isinstance(a, Vector) and a.element == types.boolean and a == b else None

    lower_builtin(symbol, Vector, Vector)(lambda context, builder, signature, arguments: emit(builder, *arguments))


_define_mask_binary(operator.or_, lambda b, x, y: b.or_(x, y))
_define_mask_binary(operator.and_, lambda b, x, y: b.and_(x, y))


@intrinsic
def is_nan(typing_context, a):
    """Mask of the places that hold NaN."""
    return _mask_of(a)(a), lambda c, b, s, arguments: b.fcmp_unordered("uno", arguments[0], arguments[0])


@intrinsic
def select(typing_context, mask, a, b):
    """`a` where the mask is set, else `b`; one of them may be a number."""
    vector = _common(a, b)

    def generate(context, builder, signature, arguments):
        chosen, *values = arguments
        left, right = (
            _as_vector(context, builder, v, source, vector) for v, source in zip(values, signature.args[1:], strict=True)
        )
        return builder.select(chosen, left, right)

    return vector(mask, a, b), generate


def _define_choice(name, relation, doc):
    def choose(typing_context, a, b):
        vector = _common(a, b)

        def generate(context, builder, signature, arguments):
            left, right = _both(context, builder, signature.args, arguments, vector)
            return builder.select(builder.fcmp_ordered(relation, left, right), left, right)

        return vector(a, b), generate

    choose.__name__ = choose.__qualname__ = name
    choose.__doc__ = doc
    return intrinsic(choose)


larger = _define_choice("larger", ">", "Maximum of two vectors, or of a vector and a number; where `a` is NaN, `b`.")
smaller = _define_choice("smaller", "<", "Minimum of two vectors, or of a vector and a number; where `a` is NaN, `b`.")


@intrinsic
def bits(typing_context, mask):
    """The mask as an integer, place 0 in the lowest bit."""

    def generate(context, builder, signature, arguments):
        packed = builder.bitcast(arguments[0], ir.IntType(mask.width))
        return builder.zext(packed, ir.IntType(64))

    return types.int64(mask), generate


@intrinsic
def square_root(typing_context, a):
    """Square root."""

    def generate(context, builder, signature, arguments):
        llvm = _llvm(a)
        name = f"llvm.sqrt.v{a.width}f{a.element.bitwidth}"
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(llvm, [llvm]), name)
        return builder.call(function, arguments)

    return a(a), generate


@intrinsic
def about_inverse(typing_context, u):
    """1 / u within 0.04 %, for normal numbers; exact where the processor has no instruction for it, and in float64."""

    def generate(context, builder, signature, arguments):
        floats, width = _llvm(u), 1 << digit_bits()
        if u.element != types.float32 or width == 1:
            return builder.fdiv(ir.Constant(floats, [1.0] * u.width), arguments[0])
        if has_avx512():
            mask = ir.IntType(16)
            given = [arguments[0], ir.Constant(floats, ir.Undefined), mask(-1)]
            kind = ir.FunctionType(floats, [floats, floats, mask])
            return builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.rcp14.ps.512"), given)
        some = ir.VectorType(ir.FloatType(), width)
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(some, [some]), "llvm.x86.avx.rcp.ps.256")
        word = ir.IntType(32)
        parts = []
        for first in range(0, u.width, width):
            places = ir.Constant(ir.VectorType(word, width), list(range(first, first + width)))
            parts.append(
                builder.call(function, [builder.shuffle_vector(arguments[0], ir.Constant(floats, ir.Undefined), places)])
            )
        return builder.shuffle_vector(*parts, ir.Constant(ir.VectorType(word, u.width), list(range(u.width))))

    return u(u), generate


@intrinsic
def total(typing_context, a):
    """Sum of all places, added pairwise."""

    def generate(context, builder, signature, arguments):
        vector, width = arguments[0], a.width
        while width > 1:
            width //= 2
            halves = [
                builder.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(ir.IntType(32), width), list(places)))
                for places in (range(width), range(width, 2 * width))
            ]
            vector = builder.fadd(*halves)
        return builder.extract_element(vector, ir.IntType(32)(0))

    return a.element(a), generate


@intrinsic
def maximum(typing_context, a):
    """Largest of all places, of which none may be NaN."""

    def generate(context, builder, signature, arguments):
        vector, width = arguments[0], a.width
        while width > 1:
            width //= 2
            low, high = (
                builder.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(ir.IntType(32), width), list(places)))
                for places in (range(width), range(width, 2 * width))
            )
            vector = builder.select(builder.fcmp_ordered(">", low, high), low, high)
        return builder.extract_element(vector, ir.IntType(32)(0))

    return a.element(a), generate


@intrinsic
def horner(typing_context, x, coefficients):
    """The polynomial with these coefficients, the highest power first, at every place of x."""

    def generate(context, builder, signature, arguments):
        value, packed = arguments
        sources = signature.args[1].types
        constants = [
            _as_vector(context, builder, c, source, x)
            for c, source in zip(cgutils.unpack_tuple(builder, packed), sources, strict=True)
        ]
        result = constants[0]
        for constant in constants[1:]:
            result = builder.fadd(builder.fmul(result, value, flags=CONTRACT), constant, flags=CONTRACT)
        return result

    return x(x, coefficients), generate


# the bits of a float: sign, exponent, mantissa

_MANTISSA_BITS = {32: 23, 64: 52}
_BIAS = {32: 127, 64: 1023}
_SQRT_HALF_BITS = {32: 0x3F3504F3, 64: 0x3FE6A09E667F3BCD}


@intrinsic
def split_exponent(typing_context, u):
    """(j, 2^-j) with u 2^-j between sqrt(1/2) and sqrt(2). u is positive and normal, j at most 126 (1022) in size."""

    def generate(context, builder, signature, arguments):
        size = u.element.bitwidth
        integers = ir.VectorType(ir.IntType(size), u.width)

        def constant(value):
            return ir.Constant(integers, [value] * u.width)

        shift = constant(_MANTISSA_BITS[size])
        offset = builder.sub(builder.bitcast(arguments[0], integers), constant(_SQRT_HALF_BITS[size]))
        if has_avx512():
            whole = builder.and_(offset, constant(-1 << _MANTISSA_BITS[size]))
            scale = builder.bitcast(builder.sub(constant(_BIAS[size] << _MANTISSA_BITS[size]), whole), _llvm(u))
            return context.make_tuple(builder, signature.return_type, [builder.fneg(_avx512(builder, "getexp", scale)), scale])
        j = builder.ashr(offset, shift)
        scale = builder.sub(constant(_BIAS[size] << _MANTISSA_BITS[size]), builder.shl(j, shift))
        parts = [builder.sitofp(j, _llvm(u)), builder.bitcast(scale, _llvm(u))]
        return context.make_tuple(builder, signature.return_type, parts)

    return types.UniTuple(u, 2)(u), generate


@intrinsic
def nearest_integer(typing_context, y):
    """(i, 2^i) with the integer i nearest to y, for y <= 0.5 whose 2^i is a normal number."""

    def generate(context, builder, signature, arguments):
        if has_avx512():
            i = _avx512(builder, "rndscale", arguments[0], 0)
            one = ir.Constant(_llvm(y), [1.0] * y.width)
            return context.make_tuple(builder, signature.return_type, [i, _avx512(builder, "scalef", one, i)])
        size = y.element.bitwidth
        integers = ir.VectorType(ir.IntType(size), y.width)

        def constant(value):
            return ir.Constant(integers, [value] * y.width)

        half = ir.Constant(_llvm(y), [0.5] * y.width)
        i = builder.fptosi(builder.fsub(arguments[0], half), integers)  # towards 0, so to the nearest of a negative number
        nearest = builder.sitofp(i, _llvm(y))
        scale = builder.shl(builder.add(i, constant(_BIAS[size])), constant(_MANTISSA_BITS[size]))
        return context.make_tuple(builder, signature.return_type, [nearest, builder.bitcast(scale, _llvm(y))])

    return types.UniTuple(y, 2)(y), generate


@intrinsic
def round_shifted(typing_context, y):
    """(i, t) with the integer i nearest to y, |y| below 2^21, and t, from which `times_power` takes i."""

    def generate(context, builder, signature, arguments):
        if has_avx512():
            i = _avx512(builder, "rndscale", arguments[0], 0)
            return context.make_tuple(builder, signature.return_type, [i, i])
        magic = ir.Constant(_llvm(y), [1.5 * 2.0 ** _MANTISSA_BITS[y.element.bitwidth]] * y.width)
        shifted = builder.fadd(arguments[0], magic)  # its last bits are i
        return context.make_tuple(builder, signature.return_type, [builder.fsub(shifted, magic), shifted])

    return types.UniTuple(y, 2)(y), generate


@intrinsic
def times_power(typing_context, q, t):
    """q 2^i for the i of which `round_shifted` made t; q and the result are normal numbers."""

    def generate(context, builder, signature, arguments):
        if has_avx512():
            return _avx512(builder, "scalef", *arguments)
        size = q.element.bitwidth
        integers = ir.VectorType(ir.IntType(size), q.width)
        value, shifted = (builder.bitcast(argument, integers) for argument in arguments)
        i = builder.shl(shifted, ir.Constant(integers, [_MANTISSA_BITS[size]] * q.width))  # added to the exponent
        return builder.bitcast(builder.add(value, i), _llvm(q))

    return q(q, t), generate


@intrinsic
def mantissa(typing_context, u):
    """u 2^-j between 1 and 2, of a positive and normal u."""

    def generate(context, builder, signature, arguments):
        size = u.element.bitwidth
        integers = ir.VectorType(ir.IntType(size), u.width)
        bits = _MANTISSA_BITS[size]
        kept = builder.and_(builder.bitcast(arguments[0], integers), ir.Constant(integers, [(1 << bits) - 1] * u.width))
        return builder.bitcast(builder.or_(kept, ir.Constant(integers, [_BIAS[size] << bits] * u.width)), _llvm(u))

    return u(u), generate


@intrinsic
def inverse_power(typing_context, u):
    """2^-j with u 2^-j between 1 and 2, of a positive and normal u."""

    def generate(context, builder, signature, arguments):
        size = u.element.bitwidth
        bits = _MANTISSA_BITS[size]
        integers = ir.VectorType(ir.IntType(size), u.width)
        ones = ((1 << (size - 1 - bits)) - 1) << bits
        exponent = builder.and_(builder.bitcast(arguments[0], integers), ir.Constant(integers, [ones] * u.width))
        return builder.bitcast(builder.sub(ir.Constant(integers, [2 * _BIAS[size] << bits] * u.width), exponent), _llvm(u))

    return u(u), generate


def digit_of(place):
    """An intrinsic: digit(table, u) takes the place of `table` that `digit_bits` bits of the exponent of each u name.

    They are its lowest ones for `place` 0, the next for 1. Both are vectors of float32; the table is repeated or longer.
    """

    @intrinsic
    def digit(typing_context, table, u):
        def generate(context, builder, signature, arguments):
            word, count = ir.IntType(32), 1 << digit_bits()
            integers, floats = (ir.VectorType(kind, u.width) for kind in (word, ir.FloatType()))
            shift = ir.Constant(integers, [_MANTISSA_BITS[32] + place * digit_bits()] * u.width)
            index = builder.lshr(builder.bitcast(arguments[1], integers), shift)
            name = "llvm.x86.avx512.permvar.sf.512" if count == u.width else "llvm.x86.avx2.permps"
            some = [ir.VectorType(kind, count) for kind in (ir.FloatType(), word)]
            function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(some[0], some), name)
            parts = []
            for first in range(0, u.width, count):
                of_part = ir.Constant(ir.VectorType(word, count), list(range(first, first + count)))
                of_table = ir.Constant(ir.VectorType(word, count), list(range(count)))
                parts.append(
                    builder.call(
                        function,
                        [
                            builder.shuffle_vector(arguments[0], ir.Constant(floats, ir.Undefined), of_table),
                            builder.shuffle_vector(index, ir.Constant(integers, ir.Undefined), of_part),
                        ],
                    )
                )
            if len(parts) == 1:
                return parts[0]
            return builder.shuffle_vector(*parts, ir.Constant(integers, list(range(u.width))))

        return u(table, u), generate

    return digit


# memory


def _widen(builder, stored, dtype, floats):
    """What memory holds, one element or a vector of them, as `floats`."""
    if dtype == types.uint16:
        integers = ir.VectorType(ir.IntType(32), floats.count) if isinstance(floats, ir.VectorType) else ir.IntType(32)
        sixteen = ir.Constant(integers, [16] * floats.count) if isinstance(floats, ir.VectorType) else integers(16)
        return builder.bitcast(builder.shl(builder.zext(stored, integers), sixteen), floats)
    if dtype == types.int16:
        halves = ir.VectorType(ir.HalfType(), floats.count) if isinstance(floats, ir.VectorType) else ir.HalfType()
        return builder.fpext(builder.bitcast(stored, halves), floats)
    return stored


def _narrow(builder, floats, dtype):
    """The inverse of `_widen`, rounded to the nearest, ties to even."""
    if dtype not in (types.uint16, types.int16):
        return floats
    count = floats.type.count if isinstance(floats.type, ir.VectorType) else None

    def like(element):
        return element if count is None else ir.VectorType(element, count)

    def constant(value, element):
        return element(value) if count is None else ir.Constant(like(element), [value] * count)

    if dtype == types.int16:
        return builder.bitcast(builder.fptrunc(floats, like(ir.HalfType())), like(ir.IntType(16)))
    word = ir.IntType(32)
    raw = builder.bitcast(floats, like(word))
    sixteen = constant(16, word)
    odd = builder.and_(builder.lshr(raw, sixteen), constant(1, word))
    rounded = builder.lshr(builder.add(raw, builder.add(odd, constant(0x7FFF, word))), sixteen)
    unordered = builder.fcmp_unordered("uno", floats, floats)
    return builder.trunc(builder.select(unordered, constant(0x7FC0, word), rounded), like(ir.IntType(16)))


def _pointer(context, builder, array_type, array, index, llvm):
    data = cgutils.create_struct_proxy(array_type)(context, builder, value=array).data
    return builder.bitcast(builder.gep(data, [index]), llvm.as_pointer())


def places(array):
    """How many elements of the array a vector holds."""


@part(places)
def _places(array):
    width = _vector_of(array).width
    return lambda array: width


@intrinsic
def load(typing_context, array, index):
    """The vector that starts at array[index]."""
    vector = _vector_of(array)

    def generate(context, builder, signature, arguments):
        stored = ir.VectorType(_llvm(array.dtype), vector.width)
        pointer = _pointer(context, builder, array, arguments[0], arguments[1], stored)
        return _widen(builder, builder.load(pointer, align=array.dtype.bitwidth // 8), array.dtype, _llvm(vector))

    return vector(array, types.int64), generate


@intrinsic
def store(typing_context, array, index, vector):
    """Write the vector to array[index] and what follows."""

    def generate(context, builder, signature, arguments):
        value = _narrow(builder, arguments[2], array.dtype)
        builder.store(
            value,
            _pointer(context, builder, array, arguments[0], arguments[1], value.type),
            align=array.dtype.bitwidth // 8,
        )
        return context.get_dummy_value()

    return types.void(array, types.int64, vector), generate


@intrinsic
def get(typing_context, array, index):
    """array[index] in the type that one computes in."""
    element = _vector_of(array).element

    def generate(context, builder, signature, arguments):
        pointer = _pointer(context, builder, array, arguments[0], arguments[1], _llvm(array.dtype))
        return _widen(builder, builder.load(pointer), array.dtype, _llvm(element))

    return element(array, types.int64), generate


@intrinsic
def put(typing_context, array, index, value):
    """array[index] = value, rounded."""
    element = _vector_of(array).element

    def generate(context, builder, signature, arguments):
        narrow = _narrow(builder, context.cast(builder, arguments[2], value, element), array.dtype)
        builder.store(narrow, _pointer(context, builder, array, arguments[0], arguments[1], narrow.type))
        return context.get_dummy_value()

    return types.void(array, types.int64, value), generate


@intrinsic
def splat(typing_context, array, value):
    """The vector, of the type that `load(array, ...)` gives, with the value in every place."""
    vector = _vector_of(array)

    def generate(context, builder, signature, arguments):
        return _as_vector(context, builder, arguments[1], value, vector)

    return vector(array, value), generate


def _compressed(builder, vector, mask, letter):
    """The places of a vector at which the mask is set, side by side, and then zeros: of AVX-512."""
    kind = ir.FunctionType(vector.type, [vector.type, vector.type, mask.type])
    name = f"llvm.x86.avx512.mask.compress.v{vector.type.count}{letter}{512 // vector.type.count}"
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.call(function, [vector, ir.Constant(vector.type, None), mask])


@intrinsic
def _store_some(typing_context, array, numbers, at, vector, mask, position):
    """Write the places at which the mask is set side by side to array[at], and position + place of each to numbers[at]."""
    integers = Vector(types.int32 if vector.element == types.float32 else types.int64, vector.width)

    def generate(context, builder, signature, arguments):
        values, marks = arguments[3], arguments[4]
        values = _compressed(builder, values, marks, "f")
        builder.store(values, _pointer(context, builder, array, arguments[0], arguments[2], values.type), align=1)
        first = _splat(builder, context.cast(builder, arguments[5], types.int64, integers.element), integers)
        found = builder.add(first, ir.Constant(_llvm(integers), list(range(vector.width))))
        narrow = ir.VectorType(_llvm(numbers.dtype), vector.width)
        found = _compressed(builder, found, marks, "i")
        found = found if found.type == narrow else builder.trunc(found, narrow)
        builder.store(found, _pointer(context, builder, numbers, arguments[1], arguments[2], narrow), align=1)
        return context.get_dummy_value()

    return types.void(array, numbers, types.int64, vector, mask, types.int64), generate


def append(array, numbers, count, vector, mask, position):
    """Write a vector's places at which the mask is set to array[count] and what follows, position + place to `numbers`.

    Up to a whole vector may be written behind them. Returns the new count.
    """


@part(append)
def _append(array, numbers, count, vector, mask, position):
    if has_avx512():

        def at_once(array, numbers, count, vector, mask, position):
            _store_some(array, numbers, count, vector, mask, position)
            return count + count_bits(bits(mask))

        return at_once

    def one_by_one(array, numbers, count, vector, mask, position):
        word = bits(mask)
        if word == 0:
            return count
        store(array, count, vector)
        base = count
        while word != 0:
            place = lowest_bit(word)
            array[count] = array[base + place]
            numbers[count] = position + place
            count += 1
            word &= word - 1
        return count

    return one_by_one


@intrinsic
def fetch_add(typing_context, array, index, value):
    """array[index] += value, so that no thread comes between; returns what was there before. Integers of 64 bits."""

    def generate(context, builder, signature, arguments):
        pointer = _pointer(context, builder, array, arguments[0], arguments[1], ir.IntType(64))
        return builder.atomic_rmw("add", pointer, arguments[2], "seq_cst")

    return types.int64(array, types.int64, types.int64), generate


@intrinsic
def array_at(typing_context, address, length, dtype):
    """The array of `length` elements of a NumPy dtype at an address."""
    array = types.Array(dtype.dtype, 1, "C")

    def generate(context, builder, signature, arguments):
        proxy = context.make_array(array)(context, builder)
        size = context.get_constant(types.intp, array.dtype.bitwidth // 8)
        context.populate_array(
            proxy,
            data=builder.inttoptr(arguments[0], context.get_data_type(array.dtype).as_pointer()),
            shape=cgutils.pack_array(builder, [arguments[1]]),
            strides=cgutils.pack_array(builder, [size]),
            itemsize=size,
            meminfo=None,
            parent=None,
        )
        return proxy._getvalue()

    return array(types.int64, types.int64, dtype), generate


@intrinsic
def prefetch(typing_context, address):
    """Have the line of the cache read that holds the address; what comes next does not wait for it."""

    def generate(context, builder, signature, arguments):
        pointer, flag = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer, flag, flag, flag])
        fetch = builder.module.declare_intrinsic("llvm.prefetch", [pointer], kind)
        to_read, to_keep, data = flag(0), flag(3), flag(1)
        builder.call(fetch, [builder.inttoptr(arguments[0], pointer), to_read, to_keep, data])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def lowest_bit(typing_context, word):
    """Position of the lowest bit that is set; the word is not 0."""

    def generate(context, builder, signature, arguments):
        return builder.cttz(arguments[0], ir.IntType(1)(1))

    return types.int64(types.int64), generate


@intrinsic
def count_bits(typing_context, word):
    """How many bits are set."""
    return types.int64(types.int64), lambda context, builder, signature, arguments: builder.ctpop(arguments[0])


@intrinsic
def lanes(typing_context, array):
    """0, 1, 2, ... in a vector of the type that `load(array, ...)` gives."""
    vector = _vector_of(array)

    def generate(context, builder, signature, arguments):
        return ir.Constant(_llvm(vector), [float(place) for place in range(vector.width)])

    return vector(array), generate


@intrinsic
def nonzero(typing_context, array, index, like):
    """Mask of which bytes from array[index] on are not 0, as many as `like`, a vector, has places."""
    mask = _mask_of(like)

    def generate(context, builder, signature, arguments):
        stored = ir.VectorType(ir.IntType(8), like.width)
        pointer = _pointer(context, builder, array, arguments[0], arguments[1], stored)
        return builder.icmp_unsigned("!=", builder.load(pointer, align=1), ir.Constant(stored, [0] * like.width))

    return mask(array, types.int64, like), generate


@intrinsic
def transpose_square(typing_context, source, at, step, target, target_at, target_step):
    """target[target_at + j target_step + i] = source[at + i step + j] for i and j below the places of a vector."""
    vector = _vector_of(source)

    def generate(context, builder, signature, arguments):
        source_array, start, step, target_array, target_start, target_step = arguments
        width, llvm = vector.width, _llvm(vector)
        stored = ir.VectorType(_llvm(source.dtype), width)
        rows = []
        for i in range(width):
            at = builder.add(start, builder.mul(step, step.type(i)))
            raw = builder.load(_pointer(context, builder, source, source_array, at, stored), align=source.dtype.bitwidth // 8)
            rows.append(_widen(builder, raw, source.dtype, llvm))
        half = width // 2
        while half:  # exchanges the off-diagonal quarters of squares of twice `half`
            low = [lane if lane & half == 0 else width + lane - half for lane in range(width)]
            high = [lane + half if lane & half == 0 else width + lane for lane in range(width)]
            masks = [ir.Constant(ir.VectorType(ir.IntType(32), width), places) for places in (low, high)]
            for i in range(width):
                if i & half == 0:
                    pair = rows[i], rows[i + half]
                    rows[i], rows[i + half] = (builder.shuffle_vector(*pair, mask) for mask in masks)
            half //= 2
        for j in range(width):
            at, value = (
                builder.add(target_start, builder.mul(target_step, target_step.type(j))),
                _narrow(builder, rows[j], target.dtype),
            )
            pointer = _pointer(context, builder, target, target_array, at, value.type)
            builder.store(value, pointer, align=target.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(source, types.int64, types.int64, target, types.int64, types.int64), generate


def product_of(rows, vectors, added_last=False):
    """An intrinsic that multiplies `rows` rows with `vectors` vectors of columns: all of the result stays in registers.

    product(a, a_rows, a_step, b, b_at, b_step, depth, c, c_rows, c_at, first, more):
        c[c_rows[first + r] + c_at + j] = sum over k < depth of a[a_rows[first + r] + k a_step] b[b_at + k b_step + j],
    added to what c holds if `more`: first, or with `added_last` after the sum, which then loses fewer digits beside a large c.
    a, b and c hold the type that one computes in, a_rows and c_rows int64.
    """

    @intrinsic
    def product(typing_context, a, a_rows, a_step, b, b_at, b_step, depth, c, c_rows, c_at, first, more):
        vector = _vector_of(c)
        llvm, element = _llvm(vector), _llvm(vector.element)
        align = vector.element.bitwidth // 8

        def generate(context, builder, signature, arguments):
            a_array, a_offsets, a_step, b_array, b_at, b_step, depth, c_array, c_offsets, c_at, first, more = arguments
            size = c_at.type

            def offset(array_type, array, r):
                return builder.load(_pointer(context, builder, array_type, array, builder.add(first, size(r)), size))

            a_at = [offset(a_rows, a_offsets, r) for r in range(rows)]
            c_at = [builder.add(offset(c_rows, c_offsets, r), c_at) for r in range(rows)]

            def at_c(r, v):
                return _pointer(context, builder, c, c_array, builder.add(c_at[r], size(v * vector.width)), llvm)

            sums = [[cgutils.alloca_once(builder, llvm) for _ in range(vectors)] for _ in range(rows)]
            zero = ir.Constant(llvm, [0.0] * vector.width)
            with builder.if_else(ir.IntType(1)(0) if added_last else more) as (then, otherwise):
                with then:
                    for r in range(rows):
                        for v in range(vectors):
                            builder.store(builder.load(at_c(r, v), align=align), sums[r][v])
                with otherwise:
                    for r in range(rows):
                        for v in range(vectors):
                            builder.store(zero, sums[r][v])
            with cgutils.for_range(builder, depth) as loop:
                b_here = builder.add(b_at, builder.mul(loop.index, b_step))
                a_here = builder.mul(loop.index, a_step)
                columns = [
                    builder.load(
                        _pointer(context, builder, b, b_array, builder.add(b_here, size(v * vector.width)), llvm), align=align
                    )
                    for v in range(vectors)
                ]
                for r in range(rows):
                    at = builder.add(a_here, a_at[r])
                    factor = _splat(builder, builder.load(_pointer(context, builder, a, a_array, at, element)), vector)
                    for v in range(vectors):
                        term = builder.fmul(factor, columns[v], flags=CONTRACT)
                        builder.store(builder.fadd(builder.load(sums[r][v]), term, flags=CONTRACT), sums[r][v])
            if added_last:
                with builder.if_then(more):
                    for r in range(rows):
                        for v in range(vectors):
                            held = builder.load(at_c(r, v), align=align)
                            builder.store(builder.fadd(held, builder.load(sums[r][v])), sums[r][v])
            for r in range(rows):
                for v in range(vectors):
                    builder.store(builder.load(sums[r][v]), at_c(r, v), align=align)
            return context.get_dummy_value()

        n = types.int64
        return types.void(a, a_rows, n, b, n, n, n, c, c_rows, n, n, more), generate

    return product


def unpacked_product_of(rows, vectors):
    """An intrinsic that multiplies `rows` rows with `vectors` vectors of columns that are stored in 4 bits.

    product(a, a_step, starts, b, b_at, b_step, half, c, c_at, c_step):
        c[c_at + r c_step + j] = starts[r] + sum over k < half of a[r a_step + k] (b[b_at + k b_step + j] & 15)
        + a[r a_step + half + k] (b[b_at + k b_step + j] >> 4), where b holds bytes, the others what one computes in.
    """

    @intrinsic
    def product(typing_context, a, a_step, starts, b, b_at, b_step, half, c, c_at, c_step):
        vector = _vector_of(c)
        width, llvm, element = vector.width, _llvm(vector), _llvm(vector.element)
        align = vector.element.bitwidth // 8
        stored, integers = (ir.VectorType(ir.IntType(size), width) for size in (8, vector.element.bitwidth))
        chains = 2 if vectors == 1 and has_avx512() else 1  # sums that do not wait for each other, where registers are left

        def generate(context, builder, signature, arguments):
            a_array, a_step, starts_array, b_array, b_at, b_step, half, c_array, c_at, c_step = arguments
            size = c_at.type

            def number(array_type, array, at):
                return _splat(builder, builder.load(_pointer(context, builder, array_type, array, at, element)), vector)

            def as_numbers(codes):
                return builder.sitofp(builder.zext(codes, integers), llvm)

            def add(place, factor, codes):
                term = builder.fmul(factor, codes, flags=CONTRACT)
                builder.store(builder.fadd(builder.load(place), term, flags=CONTRACT), place)

            sums = [[[cgutils.alloca_once(builder, llvm) for _ in range(chains)] for _ in range(vectors)] for _ in range(rows)]
            for r in range(rows):
                begun = number(starts, starts_array, size(r))
                for places in sums[r]:
                    builder.store(begun, places[0])
                    if chains > 1:
                        builder.store(ir.Constant(llvm, [0.0] * width), places[1])
            with cgutils.for_range(builder, half) as loop:
                here = builder.add(b_at, builder.mul(loop.index, b_step))
                halves = []
                for v in range(vectors):
                    pointer = _pointer(context, builder, b, b_array, builder.add(here, size(v * width)), stored)
                    packed = builder.load(pointer, align=1)
                    low = as_numbers(builder.and_(packed, ir.Constant(stored, [15] * width)))
                    halves.append((low, as_numbers(builder.lshr(packed, ir.Constant(stored, [4] * width)))))
                for r in range(rows):
                    at = builder.add(builder.mul(size(r), a_step), loop.index)
                    factors = number(a, a_array, at), number(a, a_array, builder.add(at, half))
                    for v in range(vectors):
                        for i in range(2):
                            add(sums[r][v][i % chains], factors[i], halves[v][i])
            for r in range(rows):
                for v in range(vectors):
                    found = functools.reduce(builder.fadd, [builder.load(place) for place in sums[r][v]])
                    at = builder.add(c_at, builder.add(builder.mul(size(r), c_step), size(v * width)))
                    builder.store(found, _pointer(context, builder, c, c_array, at, llvm), align=align)
            return context.get_dummy_value()

        n = types.int64
        return types.void(a, n, starts, b, n, n, n, c, n, n), generate

    return product


def dots_of(together):
    """An intrinsic that multiplies a row with as many others as a vector has places, with the sums of `together` in registers.

    dots(a, a_at, b, b_at, b_step, depth, c, c_at):
        c[c_at + i] = sum over k < depth of a[a_at + k] b[b_at + i b_step + k], where `depth` is whole vectors.
    """

    @intrinsic
    def dots(typing_context, a, a_at, b, b_at, b_step, depth, c, c_at):
        vector = _vector_of(c)
        width, llvm, align = vector.width, _llvm(vector), vector.element.bitwidth // 8

        def add_neighbours(builder, low, high):
            """The sums of neighbouring places of two vectors, those of the first before those of the second."""
            halves = [ir.Constant(ir.VectorType(ir.IntType(32), width), list(range(i, 2 * width, 2))) for i in range(2)]
            return builder.fadd(*(builder.shuffle_vector(low, high, half) for half in halves))

        def totals(builder, vectors):
            while len(vectors) > 1:
                vectors = [add_neighbours(builder, *vectors[i : i + 2]) for i in range(0, len(vectors), 2)]
            return vectors[0]

        def generate(context, builder, signature, arguments):
            a_array, a_at, b_array, b_at, b_step, depth, c_array, c_at = arguments
            size, some = c_at.type, min(together, width)

            def loaded(array_type, array, at):
                return builder.load(_pointer(context, builder, array_type, array, at, llvm), align=align)

            steps = builder.sdiv(depth, size(width))
            found = []
            for first in range(0, width, some):
                sums = [cgutils.alloca_once_value(builder, ir.Constant(llvm, [0.0] * width)) for _ in range(some)]
                rows = [builder.add(b_at, builder.mul(b_step, size(first + i))) for i in range(some)]
                for sum_of_row in sums:
                    builder.store(ir.Constant(llvm, [0.0] * width), sum_of_row)
                with cgutils.for_range(builder, steps) as loop:
                    k = builder.mul(loop.index, size(width))
                    factor = loaded(a, a_array, builder.add(a_at, k))
                    for row, sum_of_row in zip(rows, sums, strict=True):
                        term = builder.fmul(factor, loaded(b, b_array, builder.add(row, k)), flags=CONTRACT)
                        builder.store(builder.fadd(builder.load(sum_of_row), term, flags=CONTRACT), sum_of_row)
                found.append(totals(builder, [builder.load(sum_of_row) for sum_of_row in sums]))
            builder.store(totals(builder, found), _pointer(context, builder, c, c_array, c_at, llvm), align=align)
            return context.get_dummy_value()

        n = types.int64
        return types.void(a, n, b, n, n, n, c, n), generate

    return dots


def size_of(dtype):
    """Bytes of an element of a NumPy dtype."""


@part(size_of)
def _size_of(dtype):
    size = dtype.dtype.bitwidth // 8
    return lambda dtype: size
