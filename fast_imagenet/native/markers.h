/* Where a scan's tiles begin, and their bytes without stuffed zeros. A tile is what lies between
 * two restart markers: it decodes without anything before it.
 */
#if defined(__AVX512BW__) || defined(__AVX2__)
#include <immintrin.h>
#endif

/* Which of 64 bytes have this value: a bit for each. */
INLINE uint64_t find_byte(const uint8_t *at, uint8_t value) {
#if defined(__AVX512BW__)
    return _mm512_cmpeq_epi8_mask(_mm512_loadu_si512(at), _mm512_set1_epi8((char)value));
#elif defined(__AVX2__)
    const __m256i *half = (const __m256i *)at, wanted = _mm256_set1_epi8((char)value);
    uint32_t low = _mm256_movemask_epi8(_mm256_cmpeq_epi8(_mm256_loadu_si256(half), wanted));
    uint32_t high = _mm256_movemask_epi8(_mm256_cmpeq_epi8(_mm256_loadu_si256(half + 1), wanted));
    return low | (uint64_t)high << 32;
#else
    const uint64_t low = 0x7f7f7f7f7f7f7f7full, ones = 0x0101010101010101ull;
    uint64_t mask = 0, eight;
    for (int i = 0; i < 8; i++) {
        memcpy(&eight, at + 8 * i, 8);
        eight ^= ones * (uint8_t)~value;                             /* FF where it is equal */
        eight = ((eight & low) + ones) & eight & ~low;               /* top bits of those */
        mask |= (eight >> 7) * 0x0102040810204080ull >> 56 << 8 * i; /* eight bits in a row */
    }
    return mask;
#endif
}

/* Which of 64 bytes begin a marker: FF, and no stuffed zero behind it. Zeros stand for what lies
 * beyond `end`. */
INLINE uint64_t find_markers(const uint8_t *at, const uint8_t *end) {
    uint8_t last[65] = {0};
    if (RARE(end - at < 65)) at = memcpy(last, at, end - at);
    return find_byte(at, 0xFF) & ~find_byte(at + 1, 0);
}

/* Find the tiles of a scan from `at` on. places [count + 1]: tile t's bytes are those from
 * places[t] to places[t + 1] - 2. Returns whether there are `count` of them, numbered as they must
 * be, and nothing else before the end of the image. */
static int find_tiles(const uint8_t *data, int64_t size, int64_t at, int32_t *places,
                      int64_t count) {
    int64_t tile = 0;
    places[0] = (int32_t)at;
    for (; at < size; at += 64) {
        uint64_t mask = find_markers(data + at, data + size);
        for (; mask; mask &= mask - 1) {
            int64_t found = at + __builtin_ctzll(mask);
            int is_last = ++tile == count;
            if (data[found + 1] != (is_last ? 0xD9 : 0xD0 + ((tile - 1) & 7))) return 0;
            places[tile] = (int32_t)found + 2;
            if (is_last) return 1;
        }
    }
    return 0;
}

/* A tile's bytes without stuffed zeros, and 16 zeros behind them. Up to `limit` may be read; 80
 * bytes behind the last may be written. Returns their number; -1: a marker is among them. */
static int64_t unstuff(const uint8_t *from, int64_t size, const uint8_t *limit, uint8_t *to) {
    const uint8_t *end = from + size, *begin = to;
    while (from < end) {
        int64_t n = end - from < 64 ? end - from : 64;
        uint8_t last[64] = {0};
        const uint8_t *in = from;
        if (RARE(limit - from < 64)) in = memcpy(last, from, limit - from);
        uint64_t mask = find_byte(in, 0xFF);
        memcpy(to, in, 64);
        if (n < 64) mask &= (1ull << n) - 1;
        if (mask) {
            n = __builtin_ctzll(mask) + 1;
            if (from + n == limit || from[n]) return -1;
            from++; /* the stuffed zero */
        }
        from += n, to += n;
    }
    memset(to, 0, 16);
    return to - begin;
}
