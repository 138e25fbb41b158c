/* Arithmetic on 8 x 8 blocks, eight lanes at a time.
 *
 * Sums keep their order and no multiply-add is fused (FLAGS in setup.py): the numbers, and so the
 * bytes of a file, are the same on every processor.
 */
typedef float V __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t VI __attribute__((vector_size(32)));
typedef int16_t Whole __attribute__((vector_size(16), aligned(2), may_alias));
typedef uint8_t Bytes __attribute__((vector_size(8), aligned(1), may_alias));

/* In the steps that AVX2 has: within halves, then between them. */
INLINE void transpose(V *v) {
    const VI low = {0, 8, 1, 9, 4, 12, 5, 13}, high = {2, 10, 3, 11, 6, 14, 7, 15};
    const VI even = {0, 1, 8, 9, 4, 5, 12, 13}, odd = {2, 3, 10, 11, 6, 7, 14, 15};
    const VI left = {0, 1, 2, 3, 8, 9, 10, 11}, right = {4, 5, 6, 7, 12, 13, 14, 15};
    V w[8];
    for (int i = 0; i < 8; i += 4) {
        V a = __builtin_shuffle(v[i], v[i + 1], low), b = __builtin_shuffle(v[i], v[i + 1], high);
        V c = __builtin_shuffle(v[i + 2], v[i + 3], low);
        V d = __builtin_shuffle(v[i + 2], v[i + 3], high);
        w[i] = __builtin_shuffle(a, c, even), w[i + 1] = __builtin_shuffle(a, c, odd);
        w[i + 2] = __builtin_shuffle(b, d, even), w[i + 3] = __builtin_shuffle(b, d, odd);
    }
    for (int i = 0; i < 4; i++) {
        v[i] = __builtin_shuffle(w[i], w[i + 4], left);
        v[i + 4] = __builtin_shuffle(w[i], w[i + 4], right);
    }
}

/* Coefficients times their steps. */
INLINE void scale_up(const int16_t *values, const float *steps, V *to) {
    for (int row = 0; row < 8; row++, values += 8, steps += 8) {
        VI whole = __builtin_convertvector(*(const Whole *)values, VI);
        to[row] = __builtin_convertvector(whole, V) * *(const V *)steps;
    }
}

/* A value times `scale`, rounded to the nearest (a half towards zero), at most +-1023. */
INLINE int16_t level_of(float value, float scale) {
    int size = (int)((value < 0 ? -value : value) * scale + 0.4999f);
    size = size > 1023 ? 1023 : size;
    return (int16_t)(value < 0 ? -size : size);
}

#define ROUND(name, Type)                                                                          \
    APART void name(const Type *restrict values, const float *restrict scales,                     \
                    int16_t *restrict levels) {                                                    \
        for (int k = 0; k < 64; k++) levels[k] = level_of(values[k], scales[k]);                   \
    }
ROUND(round_floats, float)
ROUND(round_whole, int16_t)

static void set_mask(Block *block) {
    uint8_t flags[64];
    uint64_t eight;
    for (int k = 0; k < 64; k++) flags[k] = block->levels[k] != 0;
    block->mask = 0;
    for (int i = 0; i < 64; i += 8) {
        memcpy(&eight, flags + i, 8);
        block->mask |= (eight * 0x0102040810204080ull >> 56) << i; /* eight flags to eight bits */
    }
}

/* A block of levels from coefficients that stand column by column, as do `scales`. */
static void set_block(Block *block, const V *columns, const float *scales) {
    int16_t levels[64];
    round_floats((const float *)columns, scales, levels);
#pragma GCC unroll 64 /* places become constants */
    for (int k = 0; k < 64; k++) block->levels[k] = levels[(ZIGZAG[k] & 7) * 8 + (ZIGZAG[k] >> 3)];
    set_mask(block);
}

/* 16 samples, two rows of 8 coefficients a and b, become 8 means of pairs. The weights of a in the
 * 8 coefficients of these; those of b are the same, with the other sign where output + input is
 * odd. Outputs 0, 2, 4, 6 take inputs 0; 1, 7; 2, 6; 3, 5; then come outputs 1, 3, 5, 7 of inputs
 * 0, 1, 2, 3, 5, 6, 7. All other weights are zero. They are C[:, :4] * mean of pairs * C^T, where
 * C[k][n] = cos(k (2 n + 1) pi / 16) / 2 (k = 0: / sqrt(2)). */
static const float HALVE[35] = {
    0.5f,          0.490392625f,   -0.0975451618f, 0.461939752f,   -0.191341713f,  0.415734798f,
    -0.277785122f, 0.453063726f,   0.203873292f,   -0.0344874226f, 0.00951505825f, -0.00635775877f,
    0.0142851584f, -0.0405529179f, -0.159094825f,  0.387932509f,   0.237104431f,   -0.0405529179f,
    0.0270965938f, -0.0982118696f, -0.077164568f,  0.106303759f,   -0.172835425f,  0.354851842f,
    0.203873292f,  -0.136223778f,  -0.146984443f,  0.034379106f,   -0.0901199803f, 0.136223778f,
    -0.173379987f, 0.359911144f,   -0.240484938f,  0.0718163401f,  -0.0270965938f};

/* o: the row of half the length that a and b become, in each of eight lanes. */
INLINE void halve_pairs(const V *a, const V *b, V *o) {
    const float *w = HALVE;
    o[0] = w[0] * (a[0] + b[0]);
    o[2] = w[1] * (a[1] - b[1]) + w[2] * (a[7] - b[7]);
    o[4] = w[3] * (a[2] + b[2]) + w[4] * (a[6] + b[6]);
    o[6] = w[5] * (a[3] - b[3]) + w[6] * (a[5] - b[5]);
    V d0 = a[0] - b[0], d1 = a[1] + b[1], d2 = a[2] - b[2], d3 = a[3] + b[3];
    V d5 = a[5] + b[5], d6 = a[6] - b[6], d7 = a[7] + b[7];
    for (int k = 1; k < 8; k += 2) {
        w = HALVE + 7 + 7 * (k / 2);
        o[k] =
            (w[0] * d0 + w[1] * d1 + w[2] * d2 + w[3] * d3) + (w[4] * d5 + w[5] * d6 + w[6] * d7);
    }
}

/* The image continued beyond its edge: a block reflected left to right, or top to bottom. */
static void mirror(const int16_t *from, int16_t *to, int down) {
    for (int i = 0; i < 64; i++) to[i] = (down ? i >> 3 : i) & 1 ? -from[i] : from[i];
}

/* Four blocks of coefficients (top left, top right, bottom left, bottom right; row by row) to one.
 * steps: theirs, row by row. scales: 1 / new step, column by column. */
APART void halve_block(const int16_t *const *four, const float *steps, const float *scales,
                       Block *block) {
    V a[8], b[8], left[8], right[8];
    scale_up(four[0], steps, a), scale_up(four[2], steps, b);
    halve_pairs(a, b, left);
    scale_up(four[1], steps, a), scale_up(four[3], steps, b);
    halve_pairs(a, b, right);
    transpose(left), transpose(right);
    halve_pairs(left, right, a);
    set_block(block, a, scales);
}

/* Arai, Agui and Nakajima's, as in libjpeg's jidctflt.c and jfdctflt.c: the factors of AAN[u] *
 * AAN[v] belong to the steps. */
static const float AAN[8] = {1, 1.387039845f, 1.306562965f, 1.175875602f,
                             1, 0.785694958f, 0.541196100f, 0.275899379f};

INLINE void to_samples(V *v) {
    V a = v[0] + v[4], b = v[0] - v[4], c = v[2] + v[6];
    V d = (v[2] - v[6]) * 1.414213562f - c;
    V e0 = a + c, e3 = a - c, e1 = b + d, e2 = b - d;
    V z13 = v[5] + v[3], z10 = v[5] - v[3], z11 = v[1] + v[7], z12 = v[1] - v[7];
    V z5 = (z10 + z12) * 1.847759065f, o7 = z11 + z13;
    V o6 = z5 - z10 * 2.613125930f - o7;
    V o5 = (z11 - z13) * 1.414213562f - o6;
    V o4 = z5 - z12 * 1.082392200f - o5;
    v[0] = e0 + o7, v[7] = e0 - o7, v[1] = e1 + o6, v[6] = e1 - o6;
    v[2] = e2 + o5, v[5] = e2 - o5, v[3] = e3 + o4, v[4] = e3 - o4;
}

INLINE void to_coefficients(V *v) {
    V s0 = v[0] + v[7], s1 = v[1] + v[6], s2 = v[2] + v[5], s3 = v[3] + v[4];
    V d0 = v[0] - v[7], d1 = v[1] - v[6], d2 = v[2] - v[5], d3 = v[3] - v[4];
    V a = s0 + s3, b = s1 + s2, c = s0 - s3, e = (s1 - s2 + c) * 0.707106781f;
    v[0] = a + b, v[4] = a - b, v[2] = c + e, v[6] = c - e;
    V x = d3 + d2, y = d2 + d1, z = d1 + d0;
    V z5 = (x - z) * 0.382683433f, z3 = y * 0.707106781f;
    V z2 = x * 0.541196100f + z5, z4 = z * 1.306562965f + z5;
    V p = d0 + z3, q = d0 - z3;
    v[5] = q + z2, v[3] = q - z2, v[1] = p + z4, v[7] = p - z4;
}

/* Samples 0 to 255, column by column, of coefficients that stand row by row. */
APART void samples_of(const int16_t *values, const float *steps, float *restrict to) {
    V v[8];
    scale_up(values, steps, v);
    to_samples(v), transpose(v), to_samples(v);
    const float *in = (const float *)v;
    for (int i = 0; i < 64; i++) {
        float sample = in[i] + 128;
        sample = sample < 0 ? 0 : sample;
        to[i] = sample > 255 ? 255 : sample;
    }
}

/* A block of levels of 8 x 8 samples. */
APART void block_of(const uint8_t *samples, int64_t stride, const float *scales, Block *block) {
    V v[8];
    for (int row = 0; row < 8; row++, samples += stride) {
        Whole whole = __builtin_convertvector(*(const Bytes *)samples, Whole);
        v[row] = __builtin_convertvector(__builtin_convertvector(whole, VI), V) - 128;
    }
    to_coefficients(v), transpose(v), to_coefficients(v);
    set_block(block, v, scales);
}
