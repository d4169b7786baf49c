#ifndef SMALL_WEIGHTS_H
#define SMALL_WEIGHTS_H

#include <stdint.h>

static const int8_t weight_data[54] = {
    1, -2, 3, -4, 5, -6, 7, -8, 9, -10, 11, -12, 13, -14, 15, -16, 17, -18, 1, 2,
    3, 4, 5, 6, 7, 8, 9, -1, -2, -3, -4, -5, -6, -7, -8, -9, 0, 0, 0, 0,
    127, 0, 0, 0, 0, 0, 0, 0, 0, -127, 0, 0, 0, 0
};

static const int16_t bias_data[3] = {
    100, -200, 300
};

static const int32_t multiplier_data[3] = {
    1073741824, 1503238554, 2147483647
};

static const int8_t shift_data[3] = {
    35, 36, 37
};

#endif
