/* y = x W^T in bf16 for a W that is rebuilt a panel of columns of W^T at a time, within the cache, and nowhere else.
 *
 * For CPUs with AVX512-BF16. vdpbf16ps adds to an fp32 the products of two pairs of bf16 numbers, so a panel holds rows
 * k and k + 1 of W^T next to each other, column by column. Each y is one sum over k in this order, whichever thread
 * computes it and however many rows x has.
 */
#include "codes.h"

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
    int64_t m, x_stride;
} Sides;

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

AVX512_BF16 static void rebuild_panel(const Codes *codes, int64_t first, int64_t columns, uint32_t *panel) {
    const int64_t per_word = 32 / codes->n_bits, n_words = codes->k / per_word;
    for (int64_t word = 0; word < n_words; word++)
        for (int64_t place = 0; place < per_word; place += 2, panel += COLUMNS) {
            const Row even = row_of(codes, word, place, first), odd = row_of(codes, word, place + 1, first);
            if (columns == COLUMNS)
                rebuild_pair(&even, &odd, panel, COLUMNS); /* a number that the compiler knows */
            else
                rebuild_pair(&even, &odd, panel, columns);
        }
}

/* `rows` rows of y, in the columns of the panel that start at `first`. */
INLINE void multiply_rows(const int rows, const Codes *codes, const Sides *sides, int64_t row, const uint32_t *panel,
                          int64_t first, int64_t columns) {
    __m512 sums[ROWS][VECTORS];
    const uint16_t *x = sides->x + row * sides->x_stride;
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 3
        for (int v = 0; v < VECTORS; v++) sums[r][v] = _mm512_setzero_ps();
    for (int64_t pair = 0; pair < codes->k / 2; pair++) {
        __m512bh w[VECTORS];
#pragma GCC unroll 3
        for (int v = 0; v < VECTORS; v++) w[v] = (__m512bh)_mm512_loadu_si512(panel + pair * COLUMNS + v * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            int32_t both;
            memcpy(&both, x + r * sides->x_stride + 2 * pair, sizeof both);
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
            uint16_t *y = sides->y + (row + r) * codes->n + first + v * LANES;
            _mm256_mask_storeu_epi16(y, there, (__m256i)_mm512_cvtneps_pbh(sums[r][v]));
        }
}

AVX512_BF16 static void multiply_block(const Codes *codes, const Sides *sides, int64_t row, const uint32_t *panel,
                                       int64_t first, int64_t columns) {
#define CASE(rows) \
    case rows: \
        multiply_rows(rows, codes, sides, row, panel, first, columns); \
        break
    switch (sides->m - row) {
        CASE(1);
        CASE(2);
        CASE(3);
        CASE(4);
        CASE(5);
        CASE(6);
        CASE(7);
    default:
        multiply_rows(ROWS, codes, sides, row, panel, first, columns);
    }
#undef CASE
}

/* The part of one of `threads` threads: blocks of y, counted down the panels, and each panel that they touch. */
static void multiply_part(const Codes *codes, const Sides *sides, uint32_t *panel, int64_t thread, int64_t threads) {
    const int64_t blocks = (sides->m + ROWS - 1) / ROWS, panels = (codes->n + COLUMNS - 1) / COLUMNS;
    const int64_t begin = blocks * panels * thread / threads, end = blocks * panels * (thread + 1) / threads;
    int64_t built = -1;
    for (int64_t block = begin; block < end; block++) {
        const int64_t first = block / blocks * COLUMNS;
        const int64_t columns = codes->n - first < COLUMNS ? codes->n - first : COLUMNS;
        if (built != first) rebuild_panel(codes, first, columns, panel);
        built = first;
        multiply_block(codes, sides, block % blocks * ROWS, panel, first, columns);
    }
}

/* y = x W^T. panels: [threads, k, COLUMNS] of bf16, for the threads to work in. 0, or -1 as `qzo_rebuild`. */
int qzo_multiply(const Codes *codes, const uint16_t *x, int64_t x_stride, int64_t m, uint16_t *y, uint32_t *panels,
                 int threads) {
    const Sides sides = {x, y, m, x_stride};
    if (!groups_exist(codes)) return -1;
    if (threads < 2) {
        multiply_part(codes, &sides, panels, 0, 1);
        return 0;
    }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t thread = 0; thread < threads; thread++)
        multiply_part(codes, &sides, panels + thread * codes->k / 2 * COLUMNS, thread, threads);
    return 0;
}

#else

int64_t qzo_panel_columns(void) { return 0; }

int qzo_multiply(const Codes *codes, const uint16_t *x, int64_t x_stride, int64_t m, uint16_t *y, uint32_t *panels,
                 int threads) {
    (void)codes, (void)x, (void)x_stride, (void)m, (void)y, (void)panels, (void)threads;
    return -2;
}

#endif
