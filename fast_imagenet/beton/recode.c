/* A plain JPEG's coefficients written anew: the kernels of jpeg_recode.py in C, byte for byte.
 *
 * What each step is for stands there. Here it takes two thirds of the time: levels of a block are
 * rounded together, and those that are not zero are found in a mask of 64 bits.
 * Arrays belong to the caller (jpeg_native.py); nothing is allocated. Little-endian machines only.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
/* Kept apart: inlined into one function they spill registers and are not vectorised. */
#define APART static __attribute__((noinline))
#define RARE(condition) __builtin_expect(!!(condition), 0)

enum { LOOK = 10, END_OF_BLOCK = 128, LANES = 32, PLANE = 64 * LANES, PLANES = 11, CODE = 272 };

/* The same fields as `RecodeJob` in jpeg_native.py. */
typedef struct {
    int64_t width, height, halved, interval, size, room;
    const uint8_t *scan, *codes; /* size bytes; six Huffman tables as in DHT segments [6][CODE] */
    const float *scales, *steps, *shrink; /* [3][64], [3][64], [35]: see `M` */
    const int32_t *zigzag;
    int32_t *firsts, *spans;
    uint32_t *tokens;
    float *space;
    uint8_t *clean, *out, *segments; /* size + 4096; room; [4][CODE], written */
    int32_t *segment_sizes;          /* [4], written */
    int32_t hits[4][256];            /* zeros */
} Job;

/* ==== Reading ================================================================================= */

typedef struct {
    uint32_t look[1 << LOOK]; /* bits used, zeros before the value, its size, the code's length */
    int32_t beyond[18], offset[18], is_dc;
    uint8_t symbols[256];
} Table;

typedef struct {
    const uint8_t *at, *end;
    uint64_t bits;
    int count;
} Reader;

INLINE uint32_t entry_of(int is_dc, int length, int symbol) {
    int size = symbol & 15, zeros = is_dc ? 0 : symbol >> 4;
    if (!is_dc && size == 0 && zeros != 15) zeros = END_OF_BLOCK;
    return (uint32_t)length << 24 | size << 16 | zeros << 8 | (length + size);
}

static int fill_table(Table *table, const uint8_t *code, int is_dc) {
    int next = 0, place = 0;
    memset(table, 0, sizeof *table);
    table->is_dc = is_dc;
    memcpy(table->symbols, code + 16, 256);
    for (int length = 1; length <= 16; length++, next <<= 1) {
        if (next + code[length - 1] > 1 << length) return 0;
        table->offset[length] = place - next;
        for (int n = code[length - 1]; n > 0; n--, next++, place++) {
            if (length > LOOK) continue;
            uint32_t entry = entry_of(is_dc, length, code[16 + place]), left = LOOK - length;
            for (uint32_t i = 0; i < 1u << left; i++) table->look[((uint32_t)next << left) + i] = entry;
        }
        table->beyond[length] = next << (16 - length);
    }
    return 1;
}

APART uint32_t slow_entry(uint64_t bits, const Table *table) {
    int top = bits >> 48, length = LOOK + 1;
    while (length < 17 && top >= table->beyond[length]) length++;
    if (length == 17) return 0;
    int place = (table->offset[length] + (top >> (16 - length))) & 255;
    return entry_of(table->is_dc, length, table->symbols[place]);
}

INLINE void refill(Reader *in) {
    uint64_t next;
    memcpy(&next, in->at, 8);
    in->bits |= __builtin_bswap64(next) >> in->count;
    in->at += (63 - in->count) >> 3;
    in->count |= 56;
}

/* Entry of the next symbol (0: no such code) and its value. At most 31 bits are used. */
INLINE uint32_t next_value(Reader *in, const Table *table, int32_t *value) {
    uint32_t entry = table->look[in->bits >> (64 - LOOK)];
    if (RARE(!entry)) entry = slow_entry(in->bits, table);
    int used = entry & 255, size = entry >> 16 & 15;
    uint64_t rest = in->bits << (entry >> 24);
    int32_t negative = (int32_t)(rest >> 63) - 1; /* -1 or 0 */
    *value = (int32_t)(rest >> 1 >> (63 - size)) - (((1 << size) - 1) & negative);
    in->bits <<= used;
    in->count -= used;
    return entry;
}

INLINE int read_first(Reader *in, const Table *table, int32_t *previous) {
    int32_t value;
    refill(in);
    uint32_t entry = next_value(in, table, &value);
    *previous += value;
    return entry != 0 && abs(*previous) <= 2047;
}

/* The values of a block behind the first, where not zero. Returns whether it is sound. */
#define READ_VALUE(STORE)                               \
    {                                                   \
        int32_t value;                                  \
        uint32_t entry = next_value(&r, table, &value); \
        k += entry >> 8 & 255;                          \
        if (k > 63 || !entry) {                         \
            sound = entry && k >= END_OF_BLOCK;         \
            break;                                      \
        }                                               \
        STORE;                                          \
        k++;                                            \
    }
/* Two at a time: filling up is a third of the chain of dependent steps. */
#define READ_VALUES(STORE)                  \
    Reader r = *in;                         \
    int k = 1, sound = 1;                   \
    while (k < 64) {                        \
        refill(&r);                         \
        READ_VALUE(STORE)                   \
        if (k > 63) break;                  \
        if (RARE(r.count < 31)) refill(&r); \
        READ_VALUE(STORE)                   \
    }                                       \
    *in = r;                                \
    return sound;

APART int read_values(Reader *in, const Table *table, int16_t *values) {
    memset(values, 0, 128);
    READ_VALUES(values[k] = value)
}

APART int read_whole(Reader *in, const Table *table, const float *steps, const int32_t *zigzag,
                     float *to) {
    READ_VALUES(to[LANES * zigzag[k]] = (float)value * steps[k])
}

/* ==== Tokens ================================================================================== */

INLINE int bit_length(uint32_t value) { return value ? 32 - __builtin_clz(value) : 0; }

/* Tokens of a block's levels behind the first; `mask` says which are not zero. */
INLINE uint32_t *put_block(const int32_t *levels, int stride, uint64_t mask, uint32_t *t,
                           int32_t *hits) {
    int last = 0;
    for (mask &= ~1ull; mask; mask &= mask - 1) {
        int k = __builtin_ctzll(mask), run = k - last - 1;
        int32_t level = levels[k * stride], sign = level >> 31, size = abs(level);
        last = k;
        for (; RARE(run > 15); run -= 16) *t++ = 0xF0, hits[0xF0]++;
        size = bit_length(size > 1023 ? 1023 : size);
        *t++ = (uint32_t)((level + sign) & ((1 << size) - 1)) << 8 | run << 4 | size;
        hits[run << 4 | size]++;
    }
    if (last < 63) *t++ = 0, hits[0]++;
    return t;
}

APART uint64_t round_block(const int16_t *restrict values, const float *restrict scales,
                           int32_t *restrict levels) {
    uint8_t flags[64];
    uint64_t mask = 0, eight;
    for (int k = 0; k < 64; k++) {
        int32_t value = values[k], level = (int32_t)((float)abs(value) * scales[k] + 0.4999f);
        levels[k] = value < 0 ? -level : level;
        flags[k] = level != 0;
    }
    for (int i = 0; i < 64; i += 8) {
        memcpy(&eight, flags + i, 8);
        mask |= (eight * 0x0102040810204080ull >> 56) << i; /* eight flags to eight bits */
    }
    return mask;
}

/* One block that keeps its size; NULL: damaged. */
APART uint32_t *keep_block(Reader *in, const Table *tables, Job *job, int64_t block, int c,
                           int32_t *previous, uint32_t *t) {
    int16_t values[64] __attribute__((aligned(32)));
    int32_t levels[64] __attribute__((aligned(32)));
    const float *scales = job->scales + 64 * c;
    if (!read_first(in, &tables[2 * c], previous)) return NULL;
    if (!read_values(in, &tables[2 * c + 1], values)) return NULL;
    int32_t first = (int32_t)((float)abs(*previous) * scales[0] + 0.4999f);
    first = first > 1023 ? 1023 : first;
    job->firsts[block] = *previous > 0 ? first : -first;
    job->spans[2 * block] = (int32_t)(t - job->tokens);
    t = put_block(levels, 1, round_block(values, scales, levels), t, job->hits[c ? 3 : 1]);
    job->spans[2 * block + 1] = (int32_t)(t - job->tokens);
    return t;
}

/* Number of block b (four of luma, blue, red) of an MCU. */
INLINE int64_t block_of(int64_t rows, int64_t columns, int64_t y, int64_t x, int b) {
    if (b < 4) return (2 * y + (b >> 1)) * 2 * columns + 2 * x + (b & 1);
    return b * rows * columns + y * columns + x;
}

static uint32_t *read_halved(Reader *in, const Table *tables, Job *job) {
    int64_t rows = (job->height + 15) / 16, columns = (job->width + 15) / 16;
    int32_t previous[3] = {0};
    uint32_t *t = job->tokens;
    for (int64_t y = 0; y < rows; y++)
        for (int64_t x = 0; x < columns; x++) {
            for (int b = 0; b < 6 && t; b++) {
                int c = b < 4 ? 0 : b - 3;
                t = keep_block(in, tables, job, block_of(rows, columns, y, x, b), c, &previous[c], t);
            }
            if (!t || in->at > in->end) return NULL;
        }
    return t;
}

/* ==== Chroma at full size ===================================================================== */

APART void shrink_pairs(float *restrict o, const float *restrict a, const float *restrict b,
                        const float *restrict M, int along, int across) {
    for (int other = 0; other < 8; other++, a += across, b += across, o += across)
        for (int g = 0; g < LANES; g++) {
            float p0 = a[g], p1 = a[along + g], p2 = a[2 * along + g], p3 = a[3 * along + g];
            float q0 = b[g], q1 = b[along + g], q2 = b[2 * along + g], q3 = b[3 * along + g];
            float p5 = a[5 * along + g], p6 = a[6 * along + g], p7 = a[7 * along + g];
            float q5 = b[5 * along + g], q6 = b[6 * along + g], q7 = b[7 * along + g];
            o[g] = M[0] * (p0 + q0);
            o[2 * along + g] = M[1] * (p1 - q1) + M[2] * (p7 - q7);
            o[4 * along + g] = M[3] * (p2 + q2) + M[4] * (p6 + q6);
            o[6 * along + g] = M[5] * (p3 - q3) + M[6] * (p5 - q5);
            float d[7] = {p0 - q0, p1 + q1, p2 - q2, p3 + q3, p5 + q5, p6 - q6, p7 + q7};
            for (int row = 0; row < 4; row++) {
                const float *w = M + 7 + 7 * row;
                float r = w[0] * d[0] + w[1] * d[1] + w[2] * d[2] + w[3] * d[3];
                o[(2 * row + 1) * along + g] = r + (w[4] * d[4] + w[5] * d[5] + w[6] * d[6]);
            }
        }
}

APART void round_lanes(const float *restrict from, float scale, uint32_t bit,
                       int32_t *restrict levels, uint32_t *restrict masks) {
    for (int g = 0; g < LANES; g++) {
        float value = from[g];
        int32_t size = (int32_t)(fabsf(value) * scale + 0.4999f);
        levels[g] = value > 0 ? size : -size;
        masks[g] |= size != 0 ? bit : 0;
    }
}

static void mirror(const float *from, float *to, int first, int end, int down) {
    for (int place = 0; place < 64; place++)
        for (int g = place * LANES + first; g < place * LANES + end; g++)
            to[g] = (down ? place >> 3 : place) & 1 ? -from[g] : from[g];
}

/* LANES new blocks from the planes [2, 2] at `planes`: levels [64][LANES], masks [2][LANES]. */
static void shrink(float *planes, float *work, const Job *job, const float *scales, int32_t *levels,
                   uint32_t *masks) {
    float *done = work + 2 * PLANE;
    for (int side = 0; side < 2; side++, planes += PLANE)
        shrink_pairs(work + side * PLANE, planes, planes + 2 * PLANE, job->shrink, 8 * LANES, LANES);
    shrink_pairs(done, work, work + PLANE, job->shrink, LANES, 8 * LANES);
    memset(masks, 0, 2 * LANES * sizeof *masks);
    for (int k = 0; k < 64; k++)
        round_lanes(done + LANES * job->zigzag[k], scales[k], 1u << k % 32, levels + LANES * k,
                    masks + k / 32 * LANES);
}

/* One component of one row of new blocks, from number `block` on. */
APART uint32_t *finish_row(Job *job, int tall, int wide, int c, int64_t block, uint32_t *t) {
    int32_t levels[PLANE];
    uint32_t masks[2 * LANES];
    int columns = (wide + 1) / 2;
    for (int first = 0; first < columns; first += LANES) {
        int lanes = columns - first < LANES ? columns - first : LANES;
        float *base = job->space + (int64_t)(first / LANES) * PLANES * PLANE;
        float *planes = base + 4 * (c - 1) * PLANE;
        for (int half = 0; half < 2 && wide & 1 && first + LANES >= columns; half++)
            mirror(planes + 2 * half * PLANE, planes + (2 * half + 1) * PLANE, lanes - 1, lanes, 0);
        for (int half = 0; half < 2 && !tall; half++)
            mirror(planes + half * PLANE, planes + (half + 2) * PLANE, 0, lanes, 1);
        shrink(planes, base + 8 * PLANE, job, job->scales + 64 * c, levels, masks);
        for (int g = 0; g < lanes; g++, block++) {
            int32_t value = levels[g];
            uint64_t mask = (uint64_t)masks[LANES + g] << 32 | masks[g];
            job->firsts[block] = value > 1023 ? 1023 : value < -1023 ? -1023 : value;
            job->spans[2 * block] = (int32_t)(t - job->tokens);
            t = put_block(levels + g, LANES, mask, t, job->hits[3]);
            job->spans[2 * block + 1] = (int32_t)(t - job->tokens);
        }
    }
    return t;
}

/* Luma blocks beyond the picture: flat, as the one before. */
static uint32_t *fill_margin(Job *job, int tall, int wide, uint32_t *t) {
    int64_t columns = 2 * ((wide + 1) / 2);
    int32_t place = (int32_t)(t - job->tokens);
    *t++ = 0;
    for (int64_t y = 0; y < (tall + 1) / 2 * 2; y++)
        for (int64_t x = y < tall ? wide : 0; x < columns; x++) {
            int64_t block = y * columns + x;
            job->firsts[block] = job->firsts[y < tall ? block - 1 : block - columns + 1 - (x & 1)];
            job->spans[2 * block] = place, job->spans[2 * block + 1] = place + 1;
            job->hits[1][0]++;
        }
    return t;
}

static uint32_t *read_full(Reader *in, const Table *tables, Job *job) {
    int tall = (int)((job->height + 7) / 8), wide = (int)((job->width + 7) / 8);
    int64_t rows = (tall + 1) / 2, columns = (wide + 1) / 2;
    int32_t previous[3] = {0};
    uint32_t *t = job->tokens;
    for (int y = 0; y < tall; y++) {
        for (int x = 0; x < wide; x++) {
            t = keep_block(in, tables, job, 2 * columns * y + x, 0, previous, t);
            if (!t || in->at > in->end) return NULL;
            for (int c = 1; c < 3; c++) {
                int64_t plane = (x >> 1) / LANES * PLANES + 4 * (c - 1) + 2 * (y & 1) + (x & 1);
                float *to = job->space + plane * PLANE + (x >> 1) % LANES;
                const float *steps = job->steps + 64 * c;
                if (!read_first(in, &tables[2 * c], &previous[c])) return NULL;
                *to = (float)previous[c] * steps[0];
                if (!read_whole(in, &tables[2 * c + 1], steps, job->zigzag, to)) return NULL;
            }
        }
        if (!(y & 1) && y != tall - 1) continue;
        for (int c = 1; c < 3; c++)
            t = finish_row(job, y & 1, wide, c, (3 + c) * rows * columns + (y >> 1) * columns, t);
        memset(job->space, 0, (columns + LANES - 1) / LANES * PLANES * PLANE * sizeof(float));
    }
    return fill_margin(job, tall, wide, t);
}

/* ==== Writing ================================================================================= */

/* Replace the first levels by tokens: differences to the block before of their kind. */
static void count_firsts(Job *job, int64_t rows, int64_t columns) {
    int32_t before[3] = {0};
    for (int64_t mcu = 0; mcu < rows * columns; mcu++) {
        if (mcu % job->interval == 0) memset(before, 0, sizeof before);
        for (int b = 0; b < 6; b++) {
            int c = b < 4 ? 0 : b - 3;
            int32_t *first = &job->firsts[block_of(rows, columns, mcu / columns, mcu % columns, b)];
            int32_t step = *first - before[c], size = bit_length(abs(step));
            before[c] = *first;
            *first = ((step + (step >> 31)) & ((1 << size) - 1)) << 8 | size;
            job->hits[c ? 2 : 0][size]++;
        }
    }
}

/* Lengths of the best code of at most 16 bits for n - 1 symbols, the rarest first. */
static void code_lengths(const int32_t *counts, const int *order, int n, int *depths) {
    int64_t weights[514];
    int parents[514];
    depths[0] = 17;
    for (int scale = 0; depths[0] > 16; scale++) {
        weights[0] = 0; /* the code of all ones, which the format forbids */
        for (int i = 1; i < n; i++) {
            weights[i] = counts[order[i - 1]] >> scale;
            if (weights[i] < 1) weights[i] = 1;
        }
        for (int node = n, leaf = 0, inner = n; node < 2 * n - 1; node++) {
            weights[node] = 0;
            for (int i = 0; i < 2; i++) {
                int is_leaf = leaf < n && (inner == node || weights[leaf] <= weights[inner]);
                int next = is_leaf ? leaf++ : inner++;
                weights[node] += weights[next], parents[next] = node;
            }
        }
        depths[2 * n - 2] = 0;
        for (int node = 2 * n - 3; node >= 0; node--) depths[node] = depths[parents[node]] + 1;
    }
}

/* Code of each symbol, << 5 | length, and the DHT segment's body. Returns the body's bytes. */
static int make_code(const int32_t *counts, uint32_t *code, uint8_t *segment) {
    int order[256], depths[514], lengths[256] = {0}, used = 0, place = 0;
    for (int symbol = 0; symbol < 256; symbol++) {
        if (!counts[symbol]) continue;
        int at = used++;
        for (; at && counts[order[at - 1]] > counts[symbol]; at--) order[at] = order[at - 1];
        order[at] = symbol;
    }
    code_lengths(counts, order, used + 1, depths);
    for (int i = 0; i < used; i++) lengths[order[i]] = depths[i + 1];
    memset(segment, 0, 16);
    uint32_t next = 0;
    for (int length = 1; length <= 16; length++, next <<= 1)
        for (int symbol = 0; symbol < 256; symbol++)
            if (lengths[symbol] == length) {
                code[symbol] = next++ << 5 | length;
                segment[length - 1]++;
                segment[16 + place++] = symbol;
            }
    return 16 + place;
}

typedef struct {
    uint64_t bits;
    int count;
    uint8_t *at;
} Writer;

INLINE void flush(Writer *out) {
    while (out->count >= 8) {
        out->count -= 8;
        if ((*out->at++ = (uint8_t)(out->bits >> out->count)) == 255) *out->at++ = 0;
    }
}

INLINE void write_token(Writer *out, uint32_t token, const uint32_t *codes) {
    uint32_t entry = codes[token & 255], length = entry & 31, size = token & 15;
    out->bits = out->bits << (length + size) | (uint64_t)(entry >> 5) << size | token >> 8;
    out->count += length + size;
    if (out->count < 32) return;
    uint32_t word = (uint32_t)(out->bits >> (out->count - 32));
    if (RARE(word & 0x80808080u & ~(word + 0x01010101u))) { /* a byte may be FF */
        flush(out);
        return;
    }
    word = __builtin_bswap32(word);
    memcpy(out->at, &word, 4);
    out->at += 4, out->count -= 32;
}

APART int64_t write_scan(const Job *job, uint32_t (*codes)[256], int64_t rows, int64_t columns) {
    Writer out = {0, 0, job->out};
    for (int64_t mcu = 0; mcu < rows * columns; mcu++) {
        for (int b = 0; b < 6; b++) {
            int64_t block = block_of(rows, columns, mcu / columns, mcu % columns, b);
            const uint32_t *t = job->tokens + job->spans[2 * block];
            const uint32_t *end = job->tokens + job->spans[2 * block + 1];
            write_token(&out, job->firsts[block], codes[b < 4 ? 0 : 2]);
            while (t < end) write_token(&out, *t++, codes[b < 4 ? 1 : 3]);
        }
        int is_last = mcu + 1 == rows * columns, fill = -out.count & 7;
        if (!is_last && (mcu + 1) % job->interval) continue;
        out.bits = out.bits << fill | ((1 << fill) - 1), out.count += fill;
        flush(&out);
        *out.at++ = 0xFF;
        *out.at++ = is_last ? 0xD9 : 0xD0 + (mcu / job->interval & 7);
    }
    return out.at - job->out;
}

/* ==== The scan ================================================================================ */

/* The scan without stuffed zeros: its bytes, or -1 where a marker stands in it. */
static int64_t unstuff(const uint8_t *from, int64_t size, uint8_t *to) {
    const uint8_t *end = from + size, *begin = to;
    while (from < end) {
        const uint8_t *mark = memchr(from, 0xFF, end - from);
        int64_t count = (mark ? mark + 1 : end) - from;
        memcpy(to, from, count);
        to += count, from += count;
        if (mark && (from == end || *from++)) return -1;
    }
    memset(to, 0, 4096); /* an MCU takes at most 1.5 kB, and its end is checked */
    return to - begin;
}

/* Bytes written to job->out; -1: damaged; below: so many bytes of room are needed, negated. */
int64_t recode_scan(Job *job) {
    Table tables[6];
    uint32_t codes[4][256] = {{0}};
    int64_t rows = (job->height + 15) / 16, columns = (job->width + 15) / 16, bits = 0;
    for (int i = 0; i < 6; i++)
        if (!fill_table(&tables[i], job->codes + CODE * i, i % 2 == 0)) return -1;
    int64_t size = unstuff(job->scan, job->size, job->clean);
    if (size < 0) return -1;
    Reader in = {job->clean, job->clean + size + 8, 0, 0};
    if (!(job->halved ? read_halved : read_full)(&in, tables, job)) return -1;
    int64_t at = 8 * (in.at - job->clean) - in.count;
    if (at > 8 * size || at <= 8 * size - 8) return -1;
    count_firsts(job, rows, columns);
    for (int i = 0; i < 4; i++) {
        job->segment_sizes[i] = make_code(job->hits[i], codes[i], job->segments + CODE * i);
        for (int s = 0; s < 256; s++)
            bits += (int64_t)job->hits[i][s] * ((codes[i][s] & 31) + (s & 15));
    }
    int64_t need = bits / 4 + 4 * rows * columns + 64; /* every byte may be FF */
    return need > job->room ? -need : write_scan(job, codes, rows, columns);
}
