/* Rows of a weight from packed codes in one pass over them: what qzo/native.py calls, and documents.
 *
 * The file is compiled into a shared library when the package is installed, where there is a compiler. It needs neither
 * Python's headers nor PyTorch's. The OpenMP runtime is left to be found when the library is loaded, in the process of
 * PyTorch, which brings its own: two of them would compete for the cores.
 */
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__gnu_linux__)
#define FOR_EACH_CPU __attribute__((noinline, target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_CPU
#endif

#define ELEMENTS_PER_THREAD 32768 /* fewer are not worth waking a thread for; PyTorch's own grain */

/* Round to nearest, ties to even. A NaN keeps being one. */
static inline uint16_t to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (uint16_t)(value != value ? 0x7fc0 : rounded);
}

static inline float weight(uint32_t word, int shift, uint32_t mask, int32_t zero, float scale) {
    return (float)((int32_t)(word >> shift & mask) - zero) * scale;
}

/* One row of n weights; zeros is NULL where zero is the zero point of all. */
FOR_EACH_CPU static void bf16_row(const uint32_t *restrict words, int shift, uint32_t mask, const int32_t *restrict zeros,
                                  int32_t zero, const float *restrict scales, uint16_t *restrict row, int64_t n) {
    if (zeros)
        for (int64_t i = 0; i < n; i++) row[i] = to_bf16(weight(words[i], shift, mask, zeros[i], scales[i]));
    else
        for (int64_t i = 0; i < n; i++) row[i] = to_bf16(weight(words[i], shift, mask, zero, scales[i]));
}

FOR_EACH_CPU static void fp32_row(const uint32_t *restrict words, int shift, uint32_t mask, const int32_t *restrict zeros,
                                  int32_t zero, const float *restrict scales, float *restrict row, int64_t n) {
    if (zeros)
        for (int64_t i = 0; i < n; i++) row[i] = weight(words[i], shift, mask, zeros[i], scales[i]);
    else
        for (int64_t i = 0; i < n; i++) row[i] = weight(words[i], shift, mask, zero, scales[i]);
}

typedef struct {
    const uint32_t *words;
    int64_t words_stride, groups, k, n;
    const float *scales;
    const int32_t *zeros, *g_idx;
    void *out;
    int32_t zero;
    int n_bits, is_bf16;
} Weight;

/* The rows whose codes are in row `number` of the words. */
static void rows_of_word(const Weight *w, int64_t number) {
    const int64_t per_word = 32 / w->n_bits, group_size = w->k / w->groups;
    const uint32_t mask = (1u << w->n_bits) - 1, *words = w->words + number * w->words_stride;
    for (int64_t place = 0; place < per_word; place++) {
        const int64_t row = number * per_word + place, group = w->g_idx ? w->g_idx[row] : row / group_size;
        const float *scales = w->scales + group * w->n;
        const int32_t *zeros = w->zeros ? w->zeros + group * w->n : 0;
        const int shift = (int)(place * w->n_bits);
        if (w->is_bf16)
            bf16_row(words, shift, mask, zeros, w->zero, scales, (uint16_t *)w->out + row * w->n, w->n);
        else
            fp32_row(words, shift, mask, zeros, w->zero, scales, (float *)w->out + row * w->n, w->n);
    }
}

/* out [k, n] = (codes - zeros) * scales, see qzo/native.py. 0, or -1 with out as it was if a group does not exist. */
int qzo_rebuild(const uint32_t *words, int64_t words_stride, int n_bits, const float *scales, const int32_t *zeros,
                int32_t zero, const int32_t *g_idx, int64_t groups, void *out, int is_bf16, int64_t k, int64_t n,
                int threads) {
    const Weight weight = {words, words_stride, groups, k, n, scales, zeros, g_idx, out, zero, n_bits, is_bf16};
    const int64_t n_words = k / (32 / n_bits), wanted = k * n / ELEMENTS_PER_THREAD;
    for (int64_t row = 0; g_idx && row < k; row++)
        if (g_idx[row] < 0 || g_idx[row] >= groups) return -1;
    if (wanted < 2 || threads < 2) { /* without the runtime, which would dismiss PyTorch's threads for a team of one */
        for (int64_t number = 0; number < n_words; number++) rows_of_word(&weight, number);
        return 0;
    }
#pragma omp parallel for num_threads(wanted < threads ? (int)wanted : threads) schedule(static)
    for (int64_t number = 0; number < n_words; number++) rows_of_word(&weight, number);
    return 0;
}
