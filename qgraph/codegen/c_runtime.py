"""Functions in C that kernels call, each written from its definition; only those that are called are written out.

All are free of undefined behaviour for what the graph's emitter has proven of their arguments: nothing overflows, no
negative number is shifted, no division is by zero.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["FUNCTIONS", "runtime_text"]

_FLOOR_SHIFT = """\
/* floor(value / 2^shift), without shifting a negative number. */
static inline int64_t floor_shift(int64_t value, int32_t shift)
{
    const int64_t sign = -(int64_t)(value < 0);
    return ((value ^ sign) >> shift) ^ sign;
}
"""

_CLAMP = """\
/* value + zero_point, within [low, high]. */
static inline int32_t clamp(int64_t value, int32_t zero_point, int32_t low, int32_t high)
{
    const int64_t saturated = value < INT32_MIN ? INT32_MIN : value > INT32_MAX ? INT32_MAX : value;
    const int64_t moved = saturated + zero_point;
    return moved < low ? low : moved > high ? high : (int32_t)moved;
}
"""

_HALF_UP = """\
/* floor(x * multiplier / 2^shift + 1/2): a half goes up. */
static inline int32_t requantize_half_up(int32_t x, int32_t multiplier, int32_t shift, int32_t zero_point,
                                         int32_t low, int32_t high)
{
    const int64_t product = (int64_t)x * multiplier;
    const int64_t half = ((int64_t)1 << shift) >> 1;
    return clamp(floor_shift(product + half, shift), zero_point, low, high);
}
"""

_HALF_EVEN = """\
/* x * multiplier / 2^shift, rounded to the nearest integer, a half to the even one. */
static inline int32_t requantize_half_even(int32_t x, int32_t multiplier, int32_t shift, int32_t zero_point,
                                           int32_t low, int32_t high)
{
    const int64_t product = (int64_t)x * multiplier;
    const int64_t half = ((int64_t)1 << shift) >> 1;
    const int64_t below = floor_shift(product, shift);
    const int64_t rest = product & (((int64_t)1 << shift) - 1);
    const int64_t up = rest > half || (shift > 0 && rest == half && (below & 1));
    return clamp(below + up, zero_point, low, high);
}
"""

_GEMMLOWP = """\
/* SaturatingRoundingDoublingHighMul, then RoundingDivideByPOT, as gemmlowp defines them. */
static inline int32_t requantize_gemmlowp(int32_t x, int32_t multiplier, int32_t shift, int32_t zero_point,
                                          int32_t low, int32_t high)
{
    const int32_t left = shift < 31 ? 31 - shift : 0;
    const int32_t right = shift > 31 ? shift - 31 : 0;
    const int64_t wide = (int64_t)x * ((int64_t)1 << left);
    const int64_t shifted = wide < INT32_MIN ? INT32_MIN : wide > INT32_MAX ? INT32_MAX : wide;
    const int64_t product = shifted * multiplier;
    const int64_t nudge = product >= 0 ? (int64_t)1 << 30 : 1 - ((int64_t)1 << 30);
    const int64_t high_part = (product + nudge) / ((int64_t)1 << 31);
    const int64_t mask = ((int64_t)1 << right) - 1;
    const int64_t threshold = (mask >> 1) + (high_part < 0);
    const int64_t rounded = floor_shift(high_part, right) + ((high_part & mask) > threshold);
    return clamp(rounded, zero_point, low, high);
}
"""

_SQRT = """\
/* floor(sqrt(x)) for x >= 0, two bits of x at a time. */
static inline int64_t integer_sqrt(int64_t x)
{
    uint64_t rest = (uint64_t)x;
    uint64_t root = 0;
    for (uint64_t bit = (uint64_t)1 << 62; bit != 0; bit >>= 2) {
        const uint64_t trial = root + bit;
        root >>= 1;
        if (rest >= trial) {
            rest -= trial;
            root += bit;
        }
    }
    return (int64_t)root;
}
"""

_DIVIDE = """\
/* a / b, rounded to the nearest integer, a half away from zero; a divisor of 0 counts as 1. */
static inline int64_t rounded_divide(int64_t a, int64_t b)
{
    const int64_t size_a = a < 0 ? -a : a;
    const int64_t size_b = b < 0 ? -b : b > 0 ? b : 1;
    const int64_t quotient = (size_a + size_b / 2) / size_b;
    return (a < 0) != (b < 0) ? -quotient : quotient;
}
"""

_TABLE = """\
/* A function of 16 bits by straight lines between 513 entries, which hold 128 times its values. */
static inline int32_t table_interpolate(int32_t x, const int32_t *table)
{
    const int32_t place = x + 32768;
    const int32_t entry = place >> 7;
    const int32_t fraction = place & 127;
    const int32_t between = table[entry] * 128 + (table[entry + 1] - table[entry]) * fraction;
    return (int32_t)floor_shift((int64_t)between + (1 << 13), 14);
}
"""

_SOFTMAX = """\
/* Softmax of a row, in place: exponentials by a table of what lies below the maximum, `one` stands for 1. */
static void softmax_row(int32_t *row, int32_t length, const int32_t *table, int32_t last, int32_t divisor, int32_t one)
{
    int32_t top = row[0];
    int64_t sum = 0;
    for (int32_t i = 1; i < length; ++i) {
        top = row[i] > top ? row[i] : top;
    }
    for (int32_t i = 0; i < length; ++i) {
        const int64_t below = (int64_t)top - row[i];
        const int64_t entry = below / divisor;
        const int64_t fraction = below % divisor;
        const int64_t left = table[entry < last ? entry : last];
        const int64_t right = table[entry + 1 < last ? entry + 1 : last];
        row[i] = (int32_t)((left * (divisor - fraction) + right * fraction + divisor / 2) / divisor);
        sum += row[i];
    }
    for (int32_t i = 0; i < length; ++i) {
        row[i] = (int32_t)(((int64_t)row[i] * one + sum / 2) / sum);
    }
}
"""

_NORMALIZE = """\
/* numerator * (row * fraction - mean) / deviation, in place. */
static void normalize_row(int32_t *row, int32_t length, int64_t fraction, int64_t mean, int64_t epsilon,
                          int64_t numerator)
{
    int64_t sum = 0;
    for (int32_t i = 0; i < length; ++i) {
        const int64_t centred = row[i] * fraction - mean;
        sum += centred * centred;
    }
    const int64_t root = integer_sqrt(sum / length + epsilon);
    const int64_t deviation = root > 1 ? root : 1;
    for (int32_t i = 0; i < length; ++i) {
        row[i] = (int32_t)rounded_divide((row[i] * fraction - mean) * numerator, deviation);
    }
}
"""

_LAYER = """\
/* Normalization by the mean and the standard deviation of a row, in place. */
static void layer_normalize_row(int32_t *row, int32_t length, int64_t fraction, int64_t epsilon, int64_t numerator)
{
    int64_t sum = 0;
    for (int32_t i = 0; i < length; ++i) {
        sum += row[i];
    }
    normalize_row(row, length, fraction, rounded_divide(sum * fraction, length), epsilon, numerator);
}
"""

_RMS = """\
/* Normalization by the root of the mean square of a row, in place. */
static void rms_normalize_row(int32_t *row, int32_t length, int64_t fraction, int64_t epsilon, int64_t numerator)
{
    normalize_row(row, length, fraction, 0, epsilon, numerator);
}
"""

_DOT = """\
/* The sum of weights times values. */
static inline int32_t dot_{bits}(const int{bits}_t *restrict weights, const int16_t *restrict values, int32_t length)
{{
    int32_t sum = 0;
    for (int32_t k = 0; k < length; ++k) {{
        sum += weights[k] * values[k];
    }}
    return sum;
}}
"""

FUNCTIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "floor_shift": (_FLOOR_SHIFT, ()),
    "clamp": (_CLAMP, ()),
    "requantize_half_up": (_HALF_UP, ("floor_shift", "clamp")),
    "requantize_half_even": (_HALF_EVEN, ("floor_shift", "clamp")),
    "requantize_gemmlowp": (_GEMMLOWP, ("floor_shift", "clamp")),
    "integer_sqrt": (_SQRT, ()),
    "rounded_divide": (_DIVIDE, ()),
    "table_interpolate": (_TABLE, ("floor_shift",)),
    "softmax_row": (_SOFTMAX, ()),
    "normalize_row": (_NORMALIZE, ("integer_sqrt", "rounded_divide")),
    "layer_normalize_row": (_LAYER, ("normalize_row", "rounded_divide")),
    "rms_normalize_row": (_RMS, ("normalize_row",)),
    "dot_8": (_DOT.format(bits=8), ()),
    "dot_16": (_DOT.format(bits=16), ()),
}
"""Name -> text, and the functions that it calls; in an order in which each stands behind what it calls."""


def runtime_text(names: Iterable[str]) -> str:
    """Return the text of some functions and of all that they call."""
    needed: set[str] = set()
    pending = list(names)
    while pending:
        name = pending.pop()
        if name not in needed:
            needed.add(name)
            pending += FUNCTIONS[name][1]
    return "\n".join(text for name, (text, _) in FUNCTIONS.items() if name in needed)
