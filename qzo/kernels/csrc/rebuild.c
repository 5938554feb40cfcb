/* Rows of a weight from its codes, in one pass over them. */
#include "codes.h"
#include "cpus.h"
#include "rows.h"

#define TILE 256 /* columns that are unpacked at a time */

FOR_EACH_CPU static void bf16_row(const Row *row, uint16_t *restrict out, int64_t n) {
    const Row r = *row;
    if (r.zeros)
        for (int64_t i = 0; i < n; i++)
            out[i] = (uint16_t)to_bf16(weight(r.words[i], r.shift, r.mask, r.zeros[i], r.scales[i]));
    else
        for (int64_t i = 0; i < n; i++)
            out[i] = (uint16_t)to_bf16(weight(r.words[i], r.shift, r.mask, r.zero, r.scales[i]));
}

FOR_EACH_CPU static void fp32_row(const Row *row, float *restrict out, int64_t n) {
    const Row r = *row;
    if (r.zeros)
        for (int64_t i = 0; i < n; i++) out[i] = weight(r.words[i], r.shift, r.mask, r.zeros[i], r.scales[i]);
    else
        for (int64_t i = 0; i < n; i++) out[i] = weight(r.words[i], r.shift, r.mask, r.zero, r.scales[i]);
}

FOR_EACH_CPU static void rebuild_unpacked_row(const Codes *codes, int64_t k, void *out, int is_bf16) {
    uint32_t unpacked[TILE];
    for (int64_t first = 0; first < codes->n; first += TILE) {
        const int64_t count = codes->n - first < TILE ? codes->n - first : TILE, offset = k * codes->n + first;
        Row row = row_of(codes, k, 0, first);
        unpack_row(codes, k, first, count, unpacked);
        row.words = unpacked;
        if (is_bf16)
            bf16_row(&row, (uint16_t *)out + offset, count);
        else
            fp32_row(&row, (float *)out + offset, count);
    }
}

/* The rows whose codes are in row `word` of the words. */
static void rebuild_rows(const Codes *codes, int64_t word, void *out, int is_bf16) {
    const int64_t per_word = rows_per_word(codes);
    if (unpacks(codes)) {
        rebuild_unpacked_row(codes, word, out, is_bf16);
        return;
    }
    for (int64_t place = 0; place < per_word; place++) {
        const Row row = row_of(codes, word, place, 0);
        const int64_t offset = (word * per_word + place) * codes->n;
        if (is_bf16)
            bf16_row(&row, (uint16_t *)out + offset, codes->n);
        else
            fp32_row(&row, (float *)out + offset, codes->n);
    }
}

/* out [k, n] = (codes - zeros) * scales in bf16 or fp32. 0, or -1 with out as it was if a group does not exist. */
int qzo_rebuild(const Codes *codes, void *out, int is_bf16, int threads) {
    const int64_t n_words = codes->k / rows_per_word(codes);
    if (!groups_exist(codes)) return -1;
    if (threads < 2) { /* without the OpenMP runtime, which would dismiss PyTorch's threads for a team of one */
        for (int64_t word = 0; word < n_words; word++) rebuild_rows(codes, word, out, is_bf16);
        return 0;
    }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t word = 0; word < n_words; word++) rebuild_rows(codes, word, out, is_bf16);
    return 0;
}

static inline __attribute__((always_inline)) void bf16_of_order(const int order, const Rows *rows, int64_t row,
                                                                uint16_t *restrict out) {
    float weights[RUN];
    for (int64_t run = 0; run < rows->k / RUN; run++, out += RUN) {
        weights_of_run(rows, order, row, run, weights);
        for (int i = 0; i < RUN; i++) out[i] = (uint16_t)to_bf16(weights[i]);
    }
}

static inline __attribute__((always_inline)) void fp32_of_order(const int order, const Rows *rows, int64_t row,
                                                                float *restrict out) {
    for (int64_t run = 0; run < rows->k / RUN; run++, out += RUN) weights_of_run(rows, order, row, run, out);
}

FOR_EACH_CPU static void bf16_runs(const Rows *rows, int64_t row, uint16_t *restrict out) {
    WITH_ORDER(rows, bf16_of_order, rows, row, out)
}

FOR_EACH_CPU static void fp32_runs(const Rows *rows, int64_t row, float *restrict out) {
    WITH_ORDER(rows, fp32_of_order, rows, row, out)
}

static void rebuild_runs(const Rows *rows, int64_t row, void *out, int is_bf16) {
    if (is_bf16)
        bf16_runs(rows, row, (uint16_t *)out + row * rows->k);
    else
        fp32_runs(rows, row, (float *)out + row * rows->k);
}

/* out [n, k] in bf16 or fp32 from codes along its rows. */
void qzo_rebuild_by_row(const Rows *rows, void *out, int is_bf16, int threads) {
    if (threads < 2) { /* as above */
        for (int64_t row = 0; row < rows->n; row++) rebuild_runs(rows, row, out, is_bf16);
        return;
    }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows->n; row++) rebuild_runs(rows, row, out, is_bf16);
}

/* What a caller's struct must have too, or it was written for other code than was compiled. */
int64_t qzo_codes_bytes(void) { return sizeof(Codes); }
int64_t qzo_rows_bytes(void) { return sizeof(Rows); }
