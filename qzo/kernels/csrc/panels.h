/* Panels of W^T for product.c: COLUMNS columns of it, rebuilt to bf16 from codes, rows k and k + 1 as pairs.

   The same differences, products and sums as in rebuild.c, each rounded, of numbers that are read where they are. Only
   what is below 2^-126 is 0 here: the instruction that rounds to bf16 takes it for 0, as the one that multiplies does. */
#ifndef QZO_PANELS_H
#define QZO_PANELS_H

#include <immintrin.h>

#include "codes.h"
#include "rows.h"

#define AVX512_BF16 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))
#define INLINE AVX512_BF16 static inline __attribute__((always_inline))
#define LANES 16
#define VECTORS 3 /* panels are as wide */
#define COLUMNS (VECTORS * LANES)

/* Lanes of vector v of a panel that has `columns` columns. */
INLINE __mmask16 lanes_there(int64_t columns, int64_t v) {
    const int64_t left = columns - v * LANES;
    return left >= LANES ? 0xffff : left <= 0 ? 0 : (__mmask16)((1u << left) - 1);
}

INLINE __m512 of_bf16s(__m256i numbers) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(numbers), 16));
}

/* What two rows have in common with all others of their groups. */
typedef struct {
    int64_t group;
    __m512 scales[VECTORS];
    __m512i zeros[VECTORS];
} Group;

INLINE void read_group(const Codes *codes, int64_t row, int64_t first, int64_t columns, Group *group) {
    const int64_t number = group_of(codes, row), from = number * codes->n + first;
    if (group->group == number) return;
    group->group = number;
#pragma GCC unroll 3
    for (int64_t v = 0; v < VECTORS; v++) {
        const int64_t at = from + v * LANES;
        const __mmask16 there = lanes_there(columns, v);
        const uint16_t *halves = (const uint16_t *)codes->scales + at;
        if (codes->scale_kind == FP32)
            group->scales[v] = _mm512_maskz_loadu_ps(there, (const float *)codes->scales + at);
        else if (codes->scale_kind == FP16)
            group->scales[v] = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(there, halves));
        else
            group->scales[v] = of_bf16s(_mm256_maskz_loadu_epi16(there, halves));
        group->zeros[v] = codes->zeros ? _mm512_maskz_loadu_epi32(there, codes->zeros + at)
                                       : _mm512_set1_epi32((int32_t)codes->zero);
    }
}

/* Where the codes of a row are: `shift` bits up in words that may hold those of other rows too. */
typedef struct {
    const uint32_t *words;
    int shift;
} Place;

INLINE __m512 weights_of(Place place, uint32_t mask, const Group *group, int64_t v, __mmask16 there) {
    const __m512i words = _mm512_maskz_loadu_epi32(there, place.words + v * LANES);
    const __m512i shifted = _mm512_srl_epi32(words, _mm_cvtsi32_si128(place.shift));
    const __m512i numbers = _mm512_sub_epi32(_mm512_and_si512(shifted, _mm512_set1_epi32((int32_t)mask)),
                                             group->zeros[v]);
    return _mm512_mul_ps(_mm512_cvtepi32_ps(numbers), group->scales[v]);
}

INLINE void rebuild_pair(const Codes *codes, Place a, Place b, const Group *even, const Group *odd, int64_t columns,
                         uint32_t *panel) {
    const uint32_t mask = (1u << codes->n_bits) - 1;
    const __m512i counted = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i behind = _mm512_slli_epi32(_mm512_add_epi32(counted, _mm512_set1_epi32(LANES)), 16);
    const __m512i in_turn = _mm512_or_si512(counted, behind);
#pragma GCC unroll 3
    for (int64_t v = 0; v < VECTORS; v++) {
        const __mmask16 there = lanes_there(columns, v);
        const __m512 low = weights_of(a, mask, even, v, there), high = weights_of(b, mask, odd, v, there);
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(high, low);
        _mm512_storeu_si512(panel + v * LANES, _mm512_permutexvar_epi16(in_turn, both));
    }
}

/* AWQ's eight columns of a word, in turn. */
INLINE void unpack_eights(const Codes *codes, int64_t row, int64_t first, int64_t columns, uint32_t *to) {
    const __m512i shifts = _mm512_set_epi32(28, 12, 24, 8, 20, 4, 16, 0, 28, 12, 24, 8, 20, 4, 16, 0);
    const __m512i of_word = _mm512_set_epi32(8, 8, 8, 8, 8, 8, 8, 8, 0, 0, 0, 0, 0, 0, 0, 0);
    const uint32_t *words = codes->words + row * codes->words_stride + first / 8;
#pragma GCC unroll 3
    for (int64_t v = 0; v < VECTORS; v++) {
        const __mmask16 there = lanes_there(columns, v) & 0x101; /* the first column of each word */
        const __m512i two = _mm512_maskz_expandloadu_epi32(there, words + 2 * v);
        const __m512i each = _mm512_permutexvar_epi32(of_word, two);
        _mm512_storeu_si512(to + v * LANES, _mm512_and_si512(_mm512_srlv_epi32(each, shifts), _mm512_set1_epi32(15)));
    }
}

AVX512_BF16 static void panel_of_codes(const Codes *codes, int64_t first, int64_t columns, uint32_t *panel) {
    const int64_t per_word = rows_per_word(codes);
    uint32_t codes_a[COLUMNS], codes_b[COLUMNS];
    Group even = {.group = -1}, odd = {.group = -1};
    for (int64_t k = 0; k < codes->k; k += 2, panel += COLUMNS) {
        Place a = {codes_a, 0}, b = {codes_b, 0};
        read_group(codes, k, first, columns, &even);
        read_group(codes, k + 1, first, columns, &odd);
        if (codes->awq) {
            unpack_eights(codes, k, first, columns, codes_a);
            unpack_eights(codes, k + 1, first, columns, codes_b);
        } else if (unpacks(codes)) {
            unpack_row(codes, k, first, columns, codes_a);
            unpack_row(codes, k + 1, first, columns, codes_b);
        } else {
            const uint32_t row = (uint32_t)k, place = row % (uint32_t)per_word;
            const uint32_t *words = codes->words + row / (uint32_t)per_word * codes->words_stride + first;
            a = (Place){words, (int)(place * codes->n_bits)}, b = (Place){words, (int)((place + 1) * codes->n_bits)};
        }
        if (columns == COLUMNS)
            rebuild_pair(codes, a, b, &even, &odd, COLUMNS, panel); /* a number that the compiler knows */
        else
            rebuild_pair(codes, a, b, &even, &odd, columns, panel);
    }
}

/* 16 x 16 words, rows become columns. */
INLINE void transpose(const __m512i from[LANES], uint32_t *to, int64_t stride) {
    __m512i a[LANES], b[LANES];
#pragma GCC unroll 8
    for (int i = 0; i < LANES; i += 2) {
        b[i] = _mm512_unpacklo_epi32(from[i], from[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(from[i], from[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < LANES; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) { /* quarters of the words i, i + 4, ..., of four rows each */
        b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
        b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
        b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
        b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        _mm512_storeu_si512(to + i * stride, _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88));
        _mm512_storeu_si512(to + (i + 4) * stride, _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0x88));
        _mm512_storeu_si512(to + (i + 8) * stride, _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd));
        _mm512_storeu_si512(to + (i + 12) * stride, _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0xdd));
    }
}

/* The number of a row and a group, in all lanes. */
INLINE __m512 number_of(const Numbers *numbers, int64_t row, int64_t group) {
    const int64_t at = row * numbers->of_row + group * numbers->of_group;
    switch (numbers->kind) {
    case FP16: return _mm512_cvtph_ps(_mm256_set1_epi16(((const int16_t *)numbers->data)[at]));
    case BF16: return of_bf16s(_mm256_set1_epi16(((const int16_t *)numbers->data)[at]));
    case INT8: return _mm512_set1_ps((float)((const int8_t *)numbers->data)[at]);
    default: return _mm512_set1_ps(((const float *)numbers->data)[at]);
    }
}

INLINE __m128i bytes_at(const uint8_t *bytes) { return _mm_loadu_si128((const __m128i *)bytes); }

/* The codes of a run, as `unpack_run` of rows.h takes them out. */
INLINE void codes_of_run(const int order, const Rows *rows, int64_t row, int64_t run, int64_t group, __m512i codes[2]) {
    const uint8_t *bytes = rows->codes + row * rows->row_bytes + run * rows->run_bytes;
    const __m128i nibble = _mm_set1_epi8(15);
    __m128i low, high;
    switch (order) {
    case BYTES:
        codes[0] = _mm512_cvtepi8_epi32(bytes_at(bytes)), codes[1] = _mm512_cvtepi8_epi32(bytes_at(bytes + 16));
        return;
    case UNSIGNED:
        codes[0] = _mm512_cvtepu8_epi32(bytes_at(bytes)), codes[1] = _mm512_cvtepu8_epi32(bytes_at(bytes + 16));
        return;
    case PLANES:
    case WORD_PLANES: {
        const uint32_t groups = (uint32_t)rows->plane_groups, at = (uint32_t)(run * RUN % rows->group_size);
        const uint32_t number = (uint32_t)(rows->first + row * (rows->k / rows->group_size) + group);
        const int shift = (int)(rows->plane_bits * (rows->planes - 1 - number / groups));
        const __m512i mask = _mm512_set1_epi32((1 << rows->plane_bits) - 1);
        bytes = rows->codes + number % groups * rows->row_bytes;
        if (order == PLANES) {
            codes[0] = _mm512_cvtepu8_epi32(bytes_at(bytes + at));
            codes[1] = _mm512_cvtepu8_epi32(bytes_at(bytes + at + 16));
        } else {
            codes[0] = _mm512_loadu_si512(bytes + 4 * at);
            codes[1] = _mm512_loadu_si512(bytes + 4 * at + 64);
        }
        for (int i = 0; i < 2; i++)
            codes[i] = _mm512_and_si512(_mm512_srl_epi32(codes[i], _mm_cvtsi32_si128(shift)), mask);
        return;
    }
    case FIFTHS: bytes += 4; /* fall through */
    default:
        low = _mm_and_si128(bytes_at(bytes), nibble);
        high = _mm_and_si128(_mm_srli_epi16(bytes_at(bytes), 4), nibble);
    }
    if (order == FIFTHS) {
        uint32_t fifth;
        memcpy(&fifth, bytes - 4, sizeof fifth);
        low = _mm_or_si128(low, _mm_maskz_set1_epi8((__mmask16)fifth, 16));
        high = _mm_or_si128(high, _mm_maskz_set1_epi8((__mmask16)(fifth >> 16), 16));
    }
    const __m128i first = order == HIGH_FIRST ? high : low, second = order == HIGH_FIRST ? low : high;
    const int in_turn = order == LOW_FIRST || order == HIGH_FIRST;
    codes[0] = _mm512_cvtepu8_epi32(in_turn ? _mm_unpacklo_epi8(first, second) : first);
    codes[1] = _mm512_cvtepu8_epi32(in_turn ? _mm_unpackhi_epi8(first, second) : second);
}

/* As `vectors_of_run` of rows.h. */
INLINE void vectors_of_8(const Rows *rows, int64_t row, int64_t run, __m512 weights[2]) {
    const uint8_t *codes = rows->codes + row * rows->row_bytes + run * rows->run_bytes;
    for (int64_t book = 0; book < rows->count; book++) {
        const uint16_t *numbers = rows->codebooks + book * rows->size * 8;
        __m128i vectors[4];
#pragma GCC unroll 4
        for (int64_t i = 0; i < 4; i++) {
            const uint8_t *at = codes + (i * rows->count + book) * rows->code_bytes;
            uint16_t code = *at;
            if (rows->code_bytes == 2) memcpy(&code, at, sizeof code);
            vectors[i] = _mm_loadu_si128((const __m128i *)(numbers + (code & (rows->size - 1)) * 8));
        }
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++) {
            const __m512 two = of_bf16s(_mm256_set_m128i(vectors[2 * i + 1], vectors[2 * i]));
            weights[i] = book ? of_bf16s((__m256i)_mm512_cvtneps_pbh(_mm512_add_ps(weights[i], two))) : two;
        }
    }
}

/* 32 weights in bf16. */
INLINE __m512i run_of(const int order, const Rows *rows, int64_t row, int64_t run, int64_t group, __m512 table) {
    const __m512 scale = number_of(&rows->scales, row, group);
    const __m512i zero = _mm512_set1_epi32((int32_t)rows->zero);
    __m512i codes[2];
    __m512 weights[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    if (order == VECTORS_OF_8)
        vectors_of_8(rows, row, run, weights);
    else
        codes_of_run(order, rows, row, run, group, codes);
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
        if (order != VECTORS_OF_8)
            weights[i] = rows->table ? _mm512_permutexvar_ps(codes[i], table)
                                     : _mm512_cvtepi32_ps(_mm512_sub_epi32(codes[i], zero));
        if (rows->zeros.data) weights[i] = _mm512_sub_ps(weights[i], number_of(&rows->zeros, row, group));
        weights[i] = _mm512_mul_ps(weights[i], scale);
        if (rows->offsets.data) weights[i] = _mm512_add_ps(weights[i], number_of(&rows->offsets, row, group));
    }
    return (__m512i)_mm512_cvtne2ps_pbh(weights[1], weights[0]);
}

INLINE void panel_of_order(const int order, const Rows *rows, int64_t first, int64_t columns, uint32_t *panel) {
    const __m512 table = rows->table ? _mm512_loadu_ps(rows->table) : _mm512_setzero_ps();
    __m512i runs[LANES];
    for (int i = 0; i < LANES; i++) runs[i] = _mm512_setzero_si512();
    for (int64_t from = 0; from < columns; from += LANES) {
        const int64_t count = columns - from < LANES ? columns - from : LANES;
        for (int64_t run = 0; run < rows->k / RUN; run++) {
            const int64_t group = run * RUN / rows->group_size;
            for (int64_t i = 0; i < count; i++) runs[i] = run_of(order, rows, first + from + i, run, group, table);
            transpose(runs, panel + run * RUN / 2 * COLUMNS + from, COLUMNS);
        }
    }
}

AVX512_BF16 static void panel_of_rows(const Rows *rows, int64_t first, int64_t columns, uint32_t *panel) {
    if (rows->order == VECTORS_OF_8 && rows->count == 1 && rows->code_bytes == 2) {
        Rows known = *rows; /* with numbers that the compiler knows */
        known.count = 1, known.code_bytes = 2, known.zeros.data = known.offsets.data = 0;
        panel_of_order(VECTORS_OF_8, &known, first, columns, panel);
        return;
    }
    WITH_ORDER(rows, panel_of_order, rows, first, columns, panel)
}

#endif
