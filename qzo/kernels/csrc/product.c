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
#include "panels.h"

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
            uint16_t *y = product->y + (row + r) * product->n + first + v * LANES;
            _mm256_mask_storeu_epi16(y, lanes_there(columns, v), (__m256i)_mm512_cvtneps_pbh(sums[r][v]));
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
