/* A weight [k, n], transposed, as packed codes with a scale and a zero point for each group of rows:
   qzo/kernels/native.py. */
#ifndef QZO_CODES_H
#define QZO_CODES_H

#include <stdint.h>
#include <string.h>

enum Kind { FP32, FP16, BF16, INT8 }; /* of numbers; as in native.py */

typedef struct {
    const uint32_t *words; /* [k * n_bits / 32, n], rows words_stride apart; of AWQ [k, n / 8] */
    int64_t words_stride;
    int64_t awq; /* whether a word holds eight columns of 4 bits, in the order of AWQ, in place of rows */
    int64_t n_bits; /* 2, 3, 4 or 8 */
    const void *scales; /* [groups, n] of scale_kind, not INT8; FP32 where rows are rebuilt */
    int64_t scale_kind;
    const int32_t *zeros; /* [groups, n], or NULL: all are `zero` */
    int64_t zero;
    const int32_t *g_idx; /* [k], or NULL: k / group_size */
    int64_t groups, group_size, k, n;
} Codes;

/* What one row of a weight is made of, from column `first` on. */
typedef struct {
    const uint32_t *words;
    const float *scales;
    const int32_t *zeros;
    uint32_t mask;
    int32_t zero;
    int shift;
} Row;

/* Whether a row's codes are unpacked first: several columns share a word, or a code lies across two. */
static inline int unpacks(const Codes *codes) { return codes->awq || codes->n_bits == 3; }

/* Rows that a row of the words holds. */
static inline int64_t rows_per_word(const Codes *codes) { return unpacks(codes) ? 1 : 32 / codes->n_bits; }

/* Columns first ... first + count of one row's codes; AWQ's eight by eight. */
static inline __attribute__((always_inline)) void unpack_row(const Codes *codes, int64_t row, int64_t first,
                                                             int64_t count, uint32_t *restrict to) {
    static const uint32_t SHIFTS[8] = {0, 16, 4, 20, 8, 24, 12, 28};
    if (!codes->awq) {
        const int64_t bit = row * codes->n_bits, shift = bit % 32;
        const uint32_t *low = codes->words + bit / 32 * codes->words_stride + first;
        const uint32_t *high = low + codes->words_stride, mask = (1u << codes->n_bits) - 1;
        if (shift + codes->n_bits <= 32)
            for (int64_t i = 0; i < count; i++) to[i] = low[i] >> shift & mask;
        else
            for (int64_t i = 0; i < count; i++) to[i] = (low[i] >> shift | high[i] << (32 - shift)) & mask;
        return;
    }
    const uint32_t *words = codes->words + row * codes->words_stride + first / 8;
    for (int64_t i = 0; i < count / 8; i++)
        for (int j = 0; j < 8; j++) to[8 * i + j] = words[i] >> SHIFTS[j] & 15;
}

static inline int64_t group_of(const Codes *codes, int64_t row) {
    return codes->g_idx ? (uint32_t)codes->g_idx[row] : (uint32_t)row / (uint32_t)codes->group_size;
}

/* The row that is number `place` of those in row `word` of the words. */
static inline Row row_of(const Codes *codes, int64_t word, int64_t place, int64_t first) {
    const int64_t offset = group_of(codes, word * rows_per_word(codes) + place) * codes->n + first;
    return (Row){
        .words = codes->words + word * codes->words_stride + first,
        .scales = (const float *)codes->scales + offset,
        .zeros = codes->zeros ? codes->zeros + offset : 0,
        .mask = (1u << codes->n_bits) - 1,
        .zero = (int32_t)codes->zero,
        .shift = (int)(place * codes->n_bits),
    };
}

static inline float weight(uint32_t word, int shift, uint32_t mask, int32_t zero, float scale) {
    return (float)((int32_t)(word >> shift & mask) - zero) * scale;
}

/* Round to nearest, ties to even. A NaN keeps being one. */
static inline uint32_t to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return value != value ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

/* Whether every group that g_idx names exists. */
static inline int groups_exist(const Codes *codes) {
    for (int64_t row = 0; codes->g_idx && row < codes->k; row++)
        if (codes->g_idx[row] < 0 || codes->g_idx[row] >= codes->groups) return 0;
    return 1;
}

#endif
