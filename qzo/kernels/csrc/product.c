/* y = x W^T in bf16 for a W that is rebuilt a panel of columns of W^T at a time, within the cache, and nowhere else.
 *
 * For CPUs with AVX512-BF16. vdpbf16ps adds to an fp32 the products of two pairs of bf16 numbers, so a panel holds rows
 * k and k + 1 of W^T next to each other, column by column. Codes lie along its columns (Codes) or its rows (Rows), and
 * are brought into that order while they are rebuilt. Each y is one sum over k in this order, whichever thread
 * computes it and however many rows x has.
 */
#include "codes.h"
#include "rows.h"

#if defined(__x86_64__) && defined(__GNUC__) && (defined(__clang__) || __GNUC__ >= 11)
#include <immintrin.h>

#define AVX512_BF16 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))
#define INLINE AVX512_BF16 static inline __attribute__((always_inline))
#define LANES 16
#define VECTORS 3 /* panels are as wide */
#define COLUMNS (VECTORS * LANES)
#define ROWS 8 /* of x at a time: ROWS * VECTORS sums, VECTORS weights and one x fit into 32 registers */

typedef struct {
    const uint16_t *x; /* [m, k], rows x_stride apart */
    uint16_t *y; /* [m, n] */
    int64_t m, x_stride, k, n;
    const Codes *codes; /* one of them */
    const Rows *rows;
} Product;

/* Columns of W^T that a thread rebuilds at a time, or 0 on a CPU without these instructions. */
int64_t qzo_panel_columns(void) {
    return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512dq") ? COLUMNS : 0;
}

/* Rows k and k + 1 of `columns` columns, as pairs. */
INLINE void rebuild_pair(const Row *even, const Row *odd, uint32_t *restrict pairs, int64_t columns) {
    const Row a = *even, b = *odd;
    for (int64_t i = 0; i < columns; i++) {
        const int32_t zero_a = a.zeros ? a.zeros[i] : a.zero, zero_b = b.zeros ? b.zeros[i] : b.zero;
        pairs[i] = to_bf16(weight(a.words[i], a.shift, a.mask, zero_a, a.scales[i])) |
                   to_bf16(weight(b.words[i], b.shift, b.mask, zero_b, b.scales[i])) << 16;
    }
}

AVX512_BF16 static void panel_of_codes(const Codes *codes, int64_t first, int64_t columns, uint32_t *panel) {
    const int64_t per_word = 32 / codes->n_bits, n_words = codes->k / per_word;
    if (unpacks(codes)) {
        uint32_t codes_a[COLUMNS], codes_b[COLUMNS];
        for (int64_t k = 0; k < codes->k; k += 2, panel += COLUMNS) {
            Row even = row_of(codes, k, 0, first), odd = row_of(codes, k + 1, 0, first);
            unpack_row(codes, k, first, columns, codes_a);
            unpack_row(codes, k + 1, first, columns, codes_b);
            even.words = codes_a, odd.words = codes_b;
            rebuild_pair(&even, &odd, panel, columns);
        }
        return;
    }
    for (int64_t word = 0; word < n_words; word++)
        for (int64_t place = 0; place < per_word; place += 2, panel += COLUMNS) {
            const Row even = row_of(codes, word, place, first), odd = row_of(codes, word, place + 1, first);
            if (columns == COLUMNS)
                rebuild_pair(&even, &odd, panel, COLUMNS); /* a number that the compiler knows */
            else
                rebuild_pair(&even, &odd, panel, columns);
        }
}

/* 16 x 16 words, rows become columns. */
INLINE void transpose(const uint32_t from[LANES][LANES], uint32_t *to, int64_t stride) {
    __m512i a[LANES], b[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) a[i] = _mm512_loadu_si512(from[i]);
#pragma GCC unroll 8
    for (int i = 0; i < LANES; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
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

INLINE void panel_of_order(const int order, const Rows *rows, int64_t first, int64_t columns, uint32_t *panel) {
    float weights[RUN];
    uint32_t pairs[LANES][LANES] = {{0}};
    for (int64_t from = 0; from < columns; from += LANES) {
        const int64_t count = columns - from < LANES ? columns - from : LANES;
        for (int64_t run = 0; run < rows->k / RUN; run++) {
            for (int64_t i = 0; i < count; i++) {
                weights_of_run(rows, order, first + from + i, run, weights);
                for (int pair = 0; pair < RUN / 2; pair++)
                    pairs[i][pair] = to_bf16(weights[2 * pair]) | to_bf16(weights[2 * pair + 1]) << 16;
            }
            transpose(pairs, panel + run * RUN / 2 * COLUMNS + from, COLUMNS);
        }
    }
}

AVX512_BF16 static void panel_of_rows(const Rows *rows, int64_t first, int64_t columns, uint32_t *panel) {
    WITH_ORDER(rows, panel_of_order, rows, first, columns, panel)
}

/* `rows` rows of y, in the columns of the panel that start at `first`. */
INLINE void multiply_rows(const int rows, const Product *product, int64_t row, const uint32_t *panel, int64_t first,
                          int64_t columns) {
    __m512 sums[ROWS][VECTORS];
    const uint16_t *x = product->x + row * product->x_stride;
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 3
        for (int v = 0; v < VECTORS; v++) sums[r][v] = _mm512_setzero_ps();
    for (int64_t pair = 0; pair < product->k / 2; pair++) {
        __m512bh w[VECTORS];
#pragma GCC unroll 3
        for (int v = 0; v < VECTORS; v++) w[v] = (__m512bh)_mm512_loadu_si512(panel + pair * COLUMNS + v * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            int32_t both;
            memcpy(&both, x + r * product->x_stride + 2 * pair, sizeof both);
            const __m512bh of_row = (__m512bh)_mm512_set1_epi32(both);
#pragma GCC unroll 3
            for (int v = 0; v < VECTORS; v++) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], of_row, w[v]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 3
        for (int v = 0; v < VECTORS; v++) {
            const int64_t left = columns - v * LANES;
            const __mmask16 there = left >= LANES ? 0xffff : left <= 0 ? 0 : (__mmask16)((1u << left) - 1);
            uint16_t *y = product->y + (row + r) * product->n + first + v * LANES;
            _mm256_mask_storeu_epi16(y, there, (__m256i)_mm512_cvtneps_pbh(sums[r][v]));
        }
}

AVX512_BF16 static void multiply_block(const Product *product, int64_t row, const uint32_t *panel, int64_t first,
                                       int64_t columns) {
#define CASE(rows) \
    case rows: \
        multiply_rows(rows, product, row, panel, first, columns); \
        break
    switch (product->m - row) {
        CASE(1);
        CASE(2);
        CASE(3);
        CASE(4);
        CASE(5);
        CASE(6);
        CASE(7);
    default:
        multiply_rows(ROWS, product, row, panel, first, columns);
    }
#undef CASE
}

/* The part of one of `threads` threads: blocks of y, counted down the panels, and each panel that they touch. */
static void multiply_part(const Product *product, uint32_t *panel, int64_t thread, int64_t threads) {
    const int64_t blocks = (product->m + ROWS - 1) / ROWS, panels = (product->n + COLUMNS - 1) / COLUMNS;
    const int64_t begin = blocks * panels * thread / threads, end = blocks * panels * (thread + 1) / threads;
    int64_t built = -1;
    for (int64_t block = begin; block < end; block++) {
        const int64_t first = block / blocks * COLUMNS;
        const int64_t columns = product->n - first < COLUMNS ? product->n - first : COLUMNS;
        if (built != first && product->codes) panel_of_codes(product->codes, first, columns, panel);
        if (built != first && product->rows) panel_of_rows(product->rows, first, columns, panel);
        built = first;
        multiply_block(product, block % blocks * ROWS, panel, first, columns);
    }
}

static void multiply(const Product *product, uint32_t *panels, int threads) {
    if (threads < 2) { /* see rebuild.c */
        multiply_part(product, panels, 0, 1);
        return;
    }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t thread = 0; thread < threads; thread++)
        multiply_part(product, panels + thread * product->k / 2 * COLUMNS, thread, threads);
}

/* y = x W^T. panels: [threads, k, COLUMNS] of bf16, for the threads to work in. 0, or -1 as `qzo_rebuild`. */
int qzo_multiply(const Codes *codes, const uint16_t *x, int64_t x_stride, int64_t m, uint16_t *y, uint32_t *panels,
                 int threads) {
    if (!groups_exist(codes)) return -1;
    multiply(&(Product){x, y, m, x_stride, codes->k, codes->n, codes, 0}, panels, threads);
    return 0;
}

/* The same with codes along the rows of W. */
void qzo_multiply_by_row(const Rows *rows, const uint16_t *x, int64_t x_stride, int64_t m, uint16_t *y,
                         uint32_t *panels, int threads) {
    multiply(&(Product){x, y, m, x_stride, rows->k, rows->n, 0, rows}, panels, threads);
}

#else

int64_t qzo_panel_columns(void) { return 0; }

int qzo_multiply(const Codes *codes, const uint16_t *x, int64_t x_stride, int64_t m, uint16_t *y, uint32_t *panels,
                 int threads) {
    (void)codes, (void)x, (void)x_stride, (void)m, (void)y, (void)panels, (void)threads;
    return -2;
}

void qzo_multiply_by_row(const Rows *rows, const uint16_t *x, int64_t x_stride, int64_t m, uint16_t *y,
                         uint32_t *panels, int threads) {
    (void)rows, (void)x, (void)x_stride, (void)m, (void)y, (void)panels, (void)threads;
}

#endif
