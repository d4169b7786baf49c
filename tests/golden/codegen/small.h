#ifndef SMALL_H
#define SMALL_H

#include <stdint.h>

/*
 * real value = (integer - ZERO_POINT) * SCALE; tensors without a scale are plain integers.
 * Tensors are laid out row by row; inputs and outputs must not overlap.
 */

/* input0: 'image', uint8_t[1, 2, 4, 4] */
#define SMALL_INPUT0_TYPE uint8_t
#define SMALL_INPUT0_RANK 4
#define SMALL_INPUT0_SHAPE {1, 2, 4, 4}
#define SMALL_INPUT0_SIZE 32
#define SMALL_INPUT0_SCALE 0.5
#define SMALL_INPUT0_ZERO_POINT 128

/* output0: 'scores', int8_t[1, 3] */
#define SMALL_OUTPUT0_TYPE int8_t
#define SMALL_OUTPUT0_RANK 2
#define SMALL_OUTPUT0_SHAPE {1, 3}
#define SMALL_OUTPUT0_SIZE 3
#define SMALL_OUTPUT0_SCALE 0.25
#define SMALL_OUTPUT0_ZERO_POINT (-3)

/* Bytes of constants, and of memory for what lies between the inputs and the outputs. */
#define SMALL_FLASH_BYTES 75
#define SMALL_RAM_BYTES 48

/* Runs the model once. Not reentrant: the memory in between is static. */
void small_run(const uint8_t *input0, int8_t *output0);

#endif
