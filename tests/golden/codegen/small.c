#include "small.h"

#include <string.h>

#include "small_weights.h"

/* floor(value / 2^shift), without shifting a negative number. */
static inline int64_t floor_shift(int64_t value, int32_t shift)
{
    const int64_t sign = -(int64_t)(value < 0);
    return ((value ^ sign) >> shift) ^ sign;
}

/* value + zero_point, within [low, high]. */
static inline int32_t clamp(int64_t value, int32_t zero_point, int32_t low, int32_t high)
{
    const int64_t saturated = value < INT32_MIN ? INT32_MIN : value > INT32_MAX ? INT32_MAX : value;
    const int64_t moved = saturated + zero_point;
    return moved < low ? low : moved > high ? high : (int32_t)moved;
}

/* floor(x * multiplier / 2^shift + 1/2): a half goes up. */
static inline int32_t requantize_half_up(int32_t x, int32_t multiplier, int32_t shift, int32_t zero_point,
                                         int32_t low, int32_t high)
{
    const int64_t product = (int64_t)x * multiplier;
    const int64_t half = ((int64_t)1 << shift) >> 1;
    return clamp(floor_shift(product + half, shift), zero_point, low, high);
}

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

/* ConvInteger->sums (ConvInteger), Add->biased (Add), Requantize->features (Requantize) -> features: uint8[1, 3, 4, 4] */
static void conv_integer_0(const uint8_t *restrict x0, uint8_t *restrict y)
{
    for (int32_t outer1 = 0; outer1 < 3; ++outer1) {
        for (int32_t at0 = 0; at0 < 4; ++at0) {
            for (int32_t at1 = 0; at1 < 4; ++at1) {
                const int32_t top = at0 - 1;
                const int32_t left = at1 - 1;
                int32_t total = 0;
                if (top >= 0 && top < 2 && left >= 0 && left < 2) {
                    for (int32_t k0 = 0; k0 < 2; ++k0) {
                        for (int32_t k1 = 0; k1 < 3; ++k1) {
                            for (int32_t k2 = 0; k2 < 3; ++k2) {
                                total += (x0[k0 * 16 + (top + k1) * 4 + left + k2] - 128) * weight_data[outer1 * 18 + k0 * 9 + k1 * 3 + k2];
                            }
                        }
                    }
                } else {
                    for (int32_t k0 = 0; k0 < 2; ++k0) {
                        for (int32_t k1 = 0; k1 < 3; ++k1) {
                            for (int32_t k2 = 0; k2 < 3; ++k2) {
                                if (top + k1 >= 0 && top + k1 < 4 && left + k2 >= 0 && left + k2 < 4) { total += (x0[k0 * 16 + (top + k1) * 4 + left + k2] - 128) * weight_data[outer1 * 18 + k0 * 9 + k1 * 3 + k2]; }
                            }
                        }
                    }
                }
                const int32_t v0 = total + bias_data[outer1];
                const int32_t v1 = requantize_half_up(v0, multiplier_data[outer1], shift_data[outer1], 10, 10, 255);
                y[outer1 * 16 + at0 * 4 + at1] = (uint8_t)v1;
            }
        }
    }
}

/* Cast->wide (Cast), Sub->centred (Sub), ReduceSum->total (ReduceSum), Requantize->mean (Requantize) -> mean: int8[1, 3] */
static void reduce_sum_0(const uint8_t *restrict x0, int8_t *restrict y)
{
    for (int32_t i1 = 0; i1 < 3; ++i1) {
        int32_t sum0 = 0;
        for (int32_t r10 = 0; r10 < 4; ++r10) {
            for (int32_t r11 = 0; r11 < 4; ++r11) {
                const int32_t v2 = x0[i1 * 16 + r10 * 4 + r11] - 10;
                sum0 += v2;
            }
        }
        const int32_t v3 = requantize_half_even(sum0, 1073741824, 34, (-3), (-128), 127);
        y[i1] = (int8_t)v3;
    }
}

/* Tensors of different types take turns here: compile with -fno-strict-aliasing. */
static int64_t arena[6];

void small_run(const uint8_t *input0, int8_t *output0)
{
    uint8_t *volatile start = (uint8_t *)arena;
    uint8_t *const memory = start;
    conv_integer_0(input0, (uint8_t *)(memory + 0));
    reduce_sum_0((uint8_t *)(memory + 0), output0);
}
