/* z of a range of elements, by the definition in qzo/kernels/philox.py. */
#include "cpus.h"

#include <stdint.h>
#include <string.h>

enum { LANES = 16, WORDS = 4, ROUNDS = 10, BLOCK_BITS = 128 };

/* What every block of a tensor has, for one direction of one step. */
typedef struct {
    uint32_t key[2];
    uint32_t tensor, direction, step;
} Stream;

/* LANES neighbouring blocks, from number `first` on; word w of lane i is words[w][i]. While they are made, words are the
   low halves of 64 bits, whose high halves are left as they come: so a product of two words is one instruction. */
static inline void philox(const Stream *stream, uint32_t first, uint32_t (*words)[LANES]) {
    uint64_t w[WORDS][LANES];
    uint32_t k0 = stream->key[0], k1 = stream->key[1];
    for (int i = 0; i < LANES; i++) {
        w[0][i] = first + (uint32_t)i;
        w[1][i] = stream->tensor;
        w[2][i] = stream->direction;
        w[3][i] = stream->step;
    }
#pragma GCC unroll 10
    for (int round = 0; round < ROUNDS; round++) {
        for (int i = 0; i < LANES; i++) {
            const uint64_t left = (uint32_t)w[0][i] * 0xD2511F53ull, right = (uint32_t)w[2][i] * 0xCD9E8D57ull;
            w[0][i] = right >> 32 ^ w[1][i] ^ k0;
            w[2][i] = left >> 32 ^ w[3][i] ^ k1;
            w[1][i] = right;
            w[3][i] = left;
        }
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    for (int j = 0; j < WORDS; j++)
        for (int i = 0; i < LANES; i++) words[j][i] = (uint32_t)w[j][i];
}

/* The number of bits in each half of a word, in its place. */
static inline uint32_t count_halves(uint32_t word) {
    word -= word >> 1 & 0x55555555u;
    word = (word & 0x33333333u) + (word >> 2 & 0x33333333u);
    word = (word + (word >> 4)) & 0x0f0f0f0fu;
    return (word + (word >> 8)) & 0x00ff00ffu;
}

/* `count` tiles of 128 elements, from number `tile` on, sixteen bits each: half of how many are 1, less 4. */
FOR_EACH_CPU static void binomial(const Stream *stream, int64_t tile, int64_t count, float *restrict out) {
    for (int64_t end = tile + count; tile < end; tile++, out += LANES * BLOCK_BITS / 16) {
        uint32_t words[WORDS][LANES];
        philox(stream, (uint32_t)(tile * LANES), words);
        for (int w = 0; w < WORDS; w++)
            for (int i = 0; i < LANES; i++) {
                const uint32_t counts = count_halves(words[w][i]);
                out[2 * w * LANES + i] = (float)(int32_t)(counts & 31) * 0.5f - 4.0f;
                out[(2 * w + 1) * LANES + i] = (float)(int32_t)(counts >> 16) * 0.5f - 4.0f;
            }
    }
}

/* `count` tiles of 2048 elements, from number `tile` on, one bit each: 1 where it is, else -1. */
FOR_EACH_CPU static void rademacher(const Stream *stream, int64_t tile, int64_t count, float *restrict out) {
    for (int64_t end = tile + count; tile < end; tile++) {
        uint32_t words[WORDS][LANES];
        philox(stream, (uint32_t)(tile * LANES), words);
        for (int w = 0; w < WORDS; w++)
            for (int bit = 0; bit < 32; bit++, out += LANES)
                for (int i = 0; i < LANES; i++) {
                    const uint32_t number = 0xbf800000u ^ (words[w][i] >> bit & 1) << 31; /* -1.0f, or 1.0f */
                    memcpy(out + i, &number, sizeof number);
                }
    }
}

typedef void Draw(const Stream *, int64_t, int64_t, float *restrict);

/* Elements low ... high - 1 of those that `draw` makes by whole tiles, to `out`. */
static void range(Draw *draw, int64_t tile_size, const Stream *stream, int64_t low, int64_t high, float *out) {
    float tile[LANES * BLOCK_BITS];
    while (low < high) {
        const int64_t number = low / tile_size, skipped = low % tile_size, whole = (high - low) / tile_size;
        int64_t count = whole * tile_size;
        if (skipped || !whole) {
            count = tile_size - skipped < high - low ? tile_size - skipped : high - low;
            draw(stream, number, 1, tile);
            memcpy(out, tile + skipped, (size_t)count * sizeof *out);
        } else {
            draw(stream, number, whole, out);
        }
        low += count;
        out += count;
    }
}

/* z of elements start ... start + count - 1 to `out`; `bits` is 16 (binomial) or 1 (Rademacher). */
void qzo_draw(float *out, int64_t start, int64_t count, uint64_t seed, uint32_t tensor, uint32_t direction,
              uint32_t step, int bits, int threads) {
    const Stream stream = {{(uint32_t)seed, (uint32_t)(seed >> 32)}, tensor, direction, step};
    Draw *draw = bits == 1 ? rademacher : binomial;
    const int64_t tile_size = LANES * BLOCK_BITS / bits, end = start + count;
    if (threads < 2) { /* without the OpenMP runtime, see rebuild.c */
        range(draw, tile_size, &stream, start, end, out);
        return;
    }
    const int64_t first = start / tile_size, tiles = (end - 1) / tile_size + 1 - first;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int share = 0; share < threads; share++) {
        const int64_t from = (first + tiles * share / threads) * tile_size;
        const int64_t to = (first + tiles * (share + 1) / threads) * tile_size;
        const int64_t low = from > start ? from : start, high = to < end ? to : end;
        range(draw, tile_size, &stream, low, high, out + (low - start));
    }
}
