/* A weight [n, k] whose codes lie along its rows, 32 in a run, with numbers for groups of whole runs:
   qzo/kernels/by_row.py. */
#ifndef QZO_ROWS_H
#define QZO_ROWS_H

#include <stdint.h>
#include <string.h>

#include "codes.h"

#define RUN 32 /* weights */

/* As in by_row.py, where each is told. */
enum Order { HALVES, FIFTHS, BYTES, UNSIGNED, LOW_FIRST, HIGH_FIRST, PLANES, WORD_PLANES, VECTORS_OF_8 };

/* One for each row and group. Where rows are rebuilt: FP32, and each row's behind the one before. */
typedef struct {
    const void *data; /* or NULL */
    int64_t kind, of_row, of_group; /* elements from a row, and from a group, to the next */
} Numbers;

typedef struct {
    const uint8_t *codes;
    int64_t order, row_bytes, run_bytes; /* from a row, and from a run, to the next; of planes, from a group */
    int64_t plane_bits, planes, plane_groups; /* bits of a code, codes of a word, and groups in the same bits of it */
    const uint16_t *codebooks; /* [count, size, 8] in bf16, of VECTORS_OF_8: its codes are numbers of such vectors, */
    int64_t count, size, code_bytes; /* `count` of them a vector, and weights the sums; size is a power of two */
    int64_t first; /* group, which of planes tells where it is; of others 0 */
    const float *table; /* [16], what the codes stand for, or NULL: for themselves, less `zero` */
    int64_t zero;
    Numbers scales, zeros, offsets; /* there are always scales */
    int64_t group_size, k, n;
} Rows;

#ifdef __clang__
static inline void look_up(const float *table, const int32_t *codes, float *values) {
    for (int i = 0; i < RUN; i++) values[i] = table[codes[i]];
}
#else
typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Places __attribute__((vector_size(64)));

static inline __attribute__((always_inline)) void look_up(const float *table, const int32_t *codes, float *values) {
    Floats all, found;
    Places places;
    memcpy(&all, table, sizeof all);
    for (int i = 0; i < RUN; i += 16) {
        memcpy(&places, codes + i, sizeof places);
        found = __builtin_shuffle(all, places); /* one instruction with AVX512 */
        memcpy(values + i, &found, sizeof found);
    }
}
#endif

/* `order` is that of rows, as a number that the compiler knows: see WITH_ORDER. */
static inline __attribute__((always_inline)) void unpack_run(const Rows *rows, const int order, int64_t row,
                                                             int64_t run, int32_t *restrict codes) {
    const uint8_t *bytes = rows->codes + row * rows->row_bytes + run * rows->run_bytes;
    switch (order) {
    case FIFTHS: {
        uint32_t fifth;
        memcpy(&fifth, bytes, sizeof fifth);
        for (int i = 0; i < 16; i++) codes[i] = (bytes[4 + i] & 15) | (int32_t)(fifth >> i & 1) << 4;
        for (int i = 0; i < 16; i++) codes[16 + i] = bytes[4 + i] >> 4 | (int32_t)(fifth >> (16 + i) & 1) << 4;
        break;
    }
    case BYTES:
        for (int i = 0; i < RUN; i++) codes[i] = (int8_t)bytes[i];
        break;
    case UNSIGNED:
        for (int i = 0; i < RUN; i++) codes[i] = bytes[i];
        break;
    case LOW_FIRST:
        for (int i = 0; i < 16; i++) codes[2 * i] = bytes[i] & 15, codes[2 * i + 1] = bytes[i] >> 4;
        break;
    case HIGH_FIRST:
        for (int i = 0; i < 16; i++) codes[2 * i] = bytes[i] >> 4, codes[2 * i + 1] = bytes[i] & 15;
        break;
    case PLANES:
    case WORD_PLANES: {
        const int64_t at = run * RUN, group = rows->first + row * (rows->k / rows->group_size) + at / rows->group_size;
        const int shift = (int)(rows->plane_bits * (rows->planes - 1 - group / rows->plane_groups));
        const int mask = (1 << rows->plane_bits) - 1;
        bytes = rows->codes + group % rows->plane_groups * rows->row_bytes;
        if (order == PLANES)
            for (int i = 0; i < RUN; i++) codes[i] = bytes[at % rows->group_size + i] >> shift & mask;
        else {
            const int32_t *words = (const int32_t *)bytes + at % rows->group_size;
            for (int i = 0; i < RUN; i++) codes[i] = words[i] >> shift & mask;
        }
        break;
    }
    default:
        for (int i = 0; i < 16; i++) codes[i] = bytes[i] & 15;
        for (int i = 0; i < 16; i++) codes[16 + i] = bytes[i] >> 4;
    }
}

static inline float of_bf16(uint16_t number) {
    const uint32_t bits = (uint32_t)number << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* Sums of vectors, each rounded to bf16, in which PyTorch's operators add them. */
static inline __attribute__((always_inline)) void vectors_of_run(const Rows *rows, int64_t row, int64_t run,
                                                                 float *restrict weights) {
    const uint8_t *codes = rows->codes + row * rows->row_bytes + run * rows->run_bytes;
    for (int64_t vector = 0; vector < RUN / 8; vector++, weights += 8)
        for (int64_t book = 0; book < rows->count; book++, codes += rows->code_bytes) {
            uint16_t code = *codes;
            if (rows->code_bytes == 2) memcpy(&code, codes, sizeof code);
            const uint16_t *numbers = rows->codebooks + (book * rows->size + (code & (rows->size - 1))) * 8;
            if (book == 0)
                for (int i = 0; i < 8; i++) weights[i] = of_bf16(numbers[i]);
            else
                for (int i = 0; i < 8; i++)
                    weights[i] = of_bf16((uint16_t)to_bf16(weights[i] + of_bf16(numbers[i])));
        }
}

/* 32 weights in fp32: a difference, a product and a sum, each rounded, as PyTorch's operators make them. */
static inline __attribute__((always_inline)) void weights_of_run(const Rows *rows, const int order, int64_t row,
                                                                 int64_t run, float *restrict weights) {
    int32_t codes[RUN];
    const int64_t at = row * (rows->k / rows->group_size) + run * RUN / rows->group_size;
    const float scale = ((const float *)rows->scales.data)[at];
    if (order != VECTORS_OF_8) unpack_run(rows, order, row, run, codes);
    if (order == VECTORS_OF_8)
        vectors_of_run(rows, row, run, weights);
    else if (rows->table)
        look_up(rows->table, codes, weights);
    else
        for (int i = 0; i < RUN; i++) weights[i] = (float)(codes[i] - (int32_t)rows->zero);
    if (rows->zeros.data) {
        const float zero = ((const float *)rows->zeros.data)[at];
        for (int i = 0; i < RUN; i++) weights[i] -= zero;
    }
    for (int i = 0; i < RUN; i++) weights[i] *= scale;
    if (rows->offsets.data) {
        const float offset = ((const float *)rows->offsets.data)[at];
        for (int i = 0; i < RUN; i++) weights[i] += offset;
    }
}

/* A statement that calls `function(order, ...)`, with the order of rows as a constant. */
#define WITH_ORDER(rows, function, ...) \
    switch ((rows)->order) { \
    case FIFTHS: function(FIFTHS, __VA_ARGS__); break; \
    case BYTES: function(BYTES, __VA_ARGS__); break; \
    case UNSIGNED: function(UNSIGNED, __VA_ARGS__); break; \
    case LOW_FIRST: function(LOW_FIRST, __VA_ARGS__); break; \
    case HIGH_FIRST: function(HIGH_FIRST, __VA_ARGS__); break; \
    case PLANES: function(PLANES, __VA_ARGS__); break; \
    case WORD_PLANES: function(WORD_PLANES, __VA_ARGS__); break; \
    case VECTORS_OF_8: function(VECTORS_OF_8, __VA_ARGS__); break; \
    default: function(HALVES, __VA_ARGS__); \
    }

#endif
