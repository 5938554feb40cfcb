/* Numbers moved along z in one pass, with what is written of them: qzo/kernels/moves.py. */
#include "codes.h"
#include "cpus.h"

#define TILE 512 /* numbers that stay in the first cache while they are worked on */

/* A tensor of `kind`, as a flat one whose elements are `stride` apart. */
typedef struct {
    void *data; /* or NULL */
    int64_t kind, stride;
} Flat;

typedef struct {
    float *master;
    Flat live, offset;
    const float *scale_start, *offset_start; /* of the offset, where there is one */
} Moved;

/* What becomes of a master: z * factor, times itself where `relative`, is added; then max(., 0) where `nonnegative`. */
typedef struct {
    const float *z; /* of the first element, or NULL: nothing is added */
    float factor;
    int relative, nonnegative, keeps; /* whether the master is what it becomes, or only what is written of it */
} Move;

/* Round to nearest, ties to even; a NaN keeps being one. */
static inline uint16_t to_fp16(float value) {
    const uint32_t half = 126u << 23; /* in whose last bits those of a subnormal number lie once it is added */
    uint32_t bits, small;
    float raised, shift;
    memcpy(&bits, &value, sizeof bits);
    const uint32_t sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    memcpy(&value, &size, sizeof value);
    memcpy(&shift, &half, sizeof shift);
    raised = value + shift;
    memcpy(&small, &raised, sizeof small);
    const uint32_t large = size > 0x7f800000 ? 0x7e00 : 0x7c00;
    const uint32_t normal = (size - (112u << 23) + 0xfff + (size >> 13 & 1)) >> 13;
    return (uint16_t)(sign | (size >= 143u << 23 ? large : size < 113u << 23 ? small - half : normal));
}

FOR_EACH_CPU static void moved(const Move *move, const float *z, const float *master, float *restrict to,
                               int64_t count) {
    const Move m = *move;
    if (m.relative)
        for (int64_t i = 0; i < count; i++) to[i] = z[i] * m.factor * master[i] + master[i];
    else
        for (int64_t i = 0; i < count; i++) to[i] = z[i] * m.factor + master[i];
    if (m.nonnegative)
        for (int64_t i = 0; i < count; i++) to[i] = to[i] < 0 ? 0 : to[i];
}

FOR_EACH_CPU static void follow(const Moved *at, const float *scale, int64_t start, float *restrict to,
                                int64_t count) {
    const float *scale_start = at->scale_start + start, *offset_start = at->offset_start + start;
    for (int64_t i = 0; i < count; i++) {
        const float ratio = scale[i] / scale_start[i];
        to[i] = (scale_start[i] == 0 ? 1 : ratio) * offset_start[i];
    }
}

FOR_EACH_CPU static void halves(int64_t kind, const float *values, uint16_t *restrict to, int64_t count) {
    if (kind == FP16)
        for (int64_t i = 0; i < count; i++) to[i] = to_fp16(values[i]);
    else
        for (int64_t i = 0; i < count; i++) to[i] = (uint16_t)to_bf16(values[i]);
}

static void write(const Flat *flat, const float *values, int64_t start, int64_t count) {
    const int64_t stride = flat->stride;
    uint16_t rounded[TILE], *short_to = (uint16_t *)flat->data + start * stride;
    float *to = (float *)flat->data + start * stride;
    if (flat->kind != FP32 && stride == 1)
        halves(flat->kind, values, short_to, count);
    else if (flat->kind != FP32) {
        halves(flat->kind, values, rounded, count);
        for (int64_t i = 0; i < count; i++) short_to[i * stride] = rounded[i];
    } else
        for (int64_t i = 0; i < count; i++) to[i * stride] = values[i];
}

static void move_tile(const Moved *at, const Move *move, int64_t start, int64_t offset, int64_t count) {
    float values[TILE], following[TILE];
    float *master = at->master + start;
    const float *now = master;
    if (move->z) {
        moved(move, move->z + offset, master, values, count);
        now = values;
        if (move->keeps) memcpy(master, values, (size_t)count * sizeof *values);
    }
    write(&at->live, now, start, count);
    if (at->offset.data) {
        follow(at, now, start, following, count);
        write(&at->offset, following, start, count);
    }
}

static void move_range(const Moved *at, const Move *move, int64_t start, int64_t from, int64_t to) {
    for (; from < to; from += TILE) move_tile(at, move, start + from, from, to - from < TILE ? to - from : TILE);
}

/* Elements start ... start + count - 1. */
void qzo_move(const Moved *at, const float *z, float factor, int relative, int nonnegative, int keeps, int64_t start,
              int64_t count, int threads) {
    const Move move = {z, factor, relative, nonnegative, keeps};
    if (threads < 2) { /* without the OpenMP runtime, see rebuild.c */
        move_range(at, &move, start, 0, count);
        return;
    }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int share = 0; share < threads; share++)
        move_range(at, &move, start, count * share / threads, count * (share + 1) / threads);
}

int64_t qzo_moved_bytes(void) { return sizeof(Moved); }
