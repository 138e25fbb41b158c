/* Reading and writing a JPEG's Huffman codes. */
#include "common.h"

enum {
    LOOK_FIRST = 10,
    LOOK = 12, /* bits that index a look-up table: of DC, of AC */
    END = 128,
    SLOW = 192,      /* marks of its entries, see Table */
    CODE = 16 + 256, /* bytes: counts of codes by length, then symbols */
    ROOM = 64 + SLOW /* numbers of a coefficient: 0 to 63, and what is added to them */
};

/* Place in an 8 x 8 block, row by row, of each coefficient in the order of the file; 64, behind the
 * block, for what lies beyond it. */
/* clang-format off */
static const uint8_t ZIGZAG[ROOM] = {
    0,  1,  8,  16, 9,  2,  3,  10, 17, 24, 32, 25, 18, 11, 4,  5,  12, 19, 26, 33, 40, 48,
    41, 34, 27, 20, 13, 6,  7,  14, 21, 28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23,
    30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63,
    [64 ... ROOM - 1] = 64};
/* clang-format on */

/* An entry: bits 0-7 all bits used by code and value, 8-15 how many places on the value lies (END:
 * end of the block), 16-31 the value. Where the index does not hold all of them: bits 0-7 zero,
 * 8-15 SLOW, 16-23 the symbol, 24-31 the code's length (0: a longer code, or none). */
typedef struct {
    uint32_t look[1 << LOOK];
    int32_t beyond[18], offset[18], is_dc, bits; /* bits: of an index */
    uint8_t code[CODE];                          /* counts and symbols, as in the file */
} Table;

/* The entry of a symbol whose value is at the top of `bits`. */
INLINE uint32_t entry_of(const Table *table, uint32_t length, int symbol, uint64_t bits) {
    uint32_t size = symbol & 15, step = table->is_dc ? 1 : (symbol >> 4) + 1;
    int value = size ? (int)(bits >> (64 - size)) : 0;
    if (size && !(bits >> 63)) value -= (1 << size) - 1;
    if (!table->is_dc && size == 0 && step != 16) step = END;
    return (length + size) | step << 8 | (uint32_t)value << 16;
}

static void fill_entries(Table *table, int first, int length, int symbol) {
    int left = table->bits - length;
    for (int i = 0; left >= 0 && i < 1 << left; i++) {
        uint32_t *entry = &table->look[(first << left) + i];
        *entry = SLOW << 8 | symbol << 16 | (uint32_t)length << 24;
        if ((symbol & 15) <= left)
            *entry = entry_of(table, length, symbol, left ? (uint64_t)i << (64 - left) : 0);
    }
}

/* Returns whether it is a code that an 8-bit image can have. */
static int fill_table(Table *table, const uint8_t *code, int is_dc) {
    int next = 0, place = 0;
    memset(table, 0, sizeof *table);
    memcpy(table->code, code, CODE);
    table->is_dc = is_dc, table->bits = is_dc ? LOOK_FIRST : LOOK;
    for (int i = 0; i < 1 << LOOK; i++) table->look[i] = SLOW << 8;
    for (int length = 1; length <= 16; length++, next <<= 1) {
        if (next + code[length - 1] >= 1 << length)
            return 0; /* a code of ones alone is not allowed */
        table->offset[length] = place - next;
        for (int n = code[length - 1]; n > 0; n--, next++, place++) {
            int symbol = code[16 + place];
            if ((symbol & 15) > 10 + is_dc || (is_dc && symbol > 11)) return 0; /* not of 8 bits */
            fill_entries(table, next, length, symbol);
        }
        table->beyond[length] = next << (16 - length);
    }
    return 1;
}

typedef struct {
    const uint8_t *at;
    uint64_t bits;
    int count;
} Reader;

/* 56 bits or more: enough for any two symbols, as none uses more than 27. */
INLINE void refill(Reader *in) {
    uint64_t next;
    memcpy(&next, in->at, 8);
    in->bits |= __builtin_bswap64(next) >> in->count;
    in->at += (63 - in->count) >> 3;
    in->count |= 56;
}

/* What the look-up table does not say; 0: no such code. */
APART uint32_t slow_entry(uint64_t bits, const Table *table, uint32_t entry) {
    int top = bits >> 48, length = entry >> 24, symbol = entry >> 16 & 255;
    if (!length) {
        for (length = table->bits + 1; length < 17 && top >= table->beyond[length];) length++;
        if (length == 17) return 0;
        symbol = table->code[16 + ((table->offset[length] + (top >> (16 - length))) & 255)];
    }
    return entry_of(table, length, symbol, bits << length);
}

INLINE void use(Reader *in, uint32_t entry) {
    in->bits <<= entry & 63;
    in->count -= entry & 255;
}

/* A block's first coefficient, a difference to the one before of its kind: added to `previous`.
 * Returns whether there is such a code. Wants 56 bits, leaves 56 - LOOK_FIRST. */
INLINE int read_first(Reader *in, const Table *table, int *previous) {
    uint32_t entry = table->look[in->bits >> (64 - LOOK_FIRST)];
    int is_slow = !(entry & 255);
    if (RARE(is_slow)) entry = slow_entry(in->bits, table, entry);
    *previous += (int32_t)entry >> 16;
    use(in, entry);
    if (RARE(is_slow)) refill(in);
    return entry & 255;
}

/* The next of a block's other coefficients, if the look-up table holds it: k, the place of the one
 * before, moves on to its place, and it goes to values[order[k]] (NULL: values[k], [ROOM]). Of LOOK
 * bits at most. Returns the entry; where k > 62 then, finish_step() follows. */
INLINE uint32_t step(Reader *in, const uint32_t *look, const uint8_t *order, int16_t *values,
                     uint32_t *k) {
    uint32_t entry = look[in->bits >> (64 - LOOK)];
    *k += entry >> 8 & 255;
    values[order ? order[*k] : *k] = (int16_t)(entry >> 16);
    use(in, entry);
    return entry;
}

/* What step() left: leaves 56 bits or more. Returns whether the stream is sound so far: the block
 * goes on where k < 63, and has ended elsewhere. */
INLINE int finish_step(Reader *in, const Table *table, const uint8_t *order, int16_t *values,
                       uint32_t *k, uint32_t entry) {
    refill(in);
    if (entry & 255) return *k == 63 || *k >= END;
    *k -= SLOW;
    entry = slow_entry(in->bits, table, entry);
    *k += entry >> 8 & 255;
    values[order ? order[*k] : *k] = (int16_t)(entry >> 16);
    use(in, entry);
    refill(in);
    return entry && (*k <= 63 || *k >= END);
}

/* The Huffman codes of all images: one made for each would save under 1 % of bytes and cost a
 * second pass. Fitted to the symbols of 173 ImageNet photographs at qualities 85, 90 and 95 and of
 * 392 of Imagenette. All symbols of 8-bit images have a code. As in a file: name, numbers of codes
 * of 1 to 16 bits, symbols; first and other levels of luma, then of chroma.
 */
/* clang-format off */
static const uint8_t CODE_TABLES[2 * (17 + 12 + 17 + 162)] = {
    0x00, 0, 0, 6, 3, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    5, 6, 4, 3, 7, 2, 0, 8, 1, 9, 10, 11,
    0x10, 0, 2, 1, 2, 5, 1, 5, 4, 5, 5, 7, 5, 4, 4, 111, 1,
    1, 2, 3, 4, 17, 5, 0, 33, 18, 6, 49, 65, 19, 7, 81, 34, 97, 113, 20, 8, 129, 50, 145, 161,
    35, 21, 66, 177, 193, 240, 82, 209, 9, 51, 225, 98, 22, 36, 114, 241, 67, 130, 146, 83, 52,
    162, 23, 37, 178, 115, 99, 210, 194, 147, 53, 131, 24, 68, 84, 38, 211, 179, 116, 85, 148,
    163, 54, 180, 149, 212, 55, 100, 69, 87, 195, 25, 181, 150, 117, 118, 226, 86, 151, 132, 39,
    164, 56, 70, 227, 182, 101, 119, 71, 196, 89, 133, 102, 134, 213, 165, 228, 57, 40, 88, 242,
    72, 197, 103, 166, 152, 26, 73, 243, 104, 41, 120, 135, 136, 229, 42, 58, 74, 90, 105, 106,
    121, 122, 137, 138, 153, 154, 167, 168, 169, 170, 183, 184, 185, 186, 198, 199, 200, 201,
    202, 214, 215, 216, 217, 218, 230, 231, 232, 233, 234, 244, 245, 246, 247, 248, 249, 250,
    10,
    0x01, 0, 1, 5, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0,
    3, 2, 4, 1, 0, 5, 6, 7, 8, 9, 11, 10,
    0x11, 0, 1, 3, 2, 4, 2, 7, 7, 1, 3, 4, 2, 5, 3, 117, 1,
    1, 0, 2, 17, 3, 33, 4, 49, 18, 65, 81, 5, 19, 97, 240, 34, 113, 129, 145, 161, 177, 50, 6,
    193, 20, 209, 225, 35, 66, 241, 21, 82, 51, 7, 98, 114, 36, 22, 130, 146, 67, 52, 178, 162,
    210, 194, 83, 53, 37, 226, 23, 68, 99, 179, 115, 84, 131, 147, 54, 211, 242, 38, 163, 69,
    195, 100, 227, 116, 132, 9, 10, 24, 25, 26, 39, 40, 41, 42, 55, 56, 57, 58, 70, 71, 72, 73,
    74, 85, 86, 87, 88, 89, 90, 101, 102, 103, 104, 105, 106, 117, 118, 119, 120, 121, 122, 133,
    134, 135, 136, 137, 138, 148, 149, 150, 151, 152, 153, 154, 164, 165, 166, 167, 168, 169,
    170, 180, 181, 182, 183, 184, 185, 186, 196, 197, 198, 199, 200, 201, 202, 212, 213, 214,
    215, 216, 217, 218, 228, 229, 230, 231, 232, 233, 234, 243, 244, 245, 246, 247, 248, 249,
    250, 8};
/* clang-format on */

typedef struct {
    uint64_t bits;
    int free; /* bits */
    uint8_t *at;
} Writer;

/* By symbol: its code << size of the value behind it << 5 | bits of both. By value + 1023: bits_of
 * it. */
typedef struct {
    uint32_t first[12], other[256], value[2 * 1023 + 1];
} Codes;

static void fill_codes(uint32_t *codes, const uint8_t *counts, const uint8_t *symbols) {
    uint32_t next = 0;
    for (int length = 1; length <= 16; length++, next <<= 1)
        for (int n = counts[length - 1]; n > 0; n--, next++, symbols++) {
            int size = *symbols & 15;
            codes[*symbols] = next << size << 5 | (length + size);
        }
}

/* The top bytes of `bits`, each FF followed by a zero. */
APART uint8_t *put_bytes(uint8_t *at, uint64_t bits, int count) {
    for (; count > 0; count--, bits <<= 8)
        if ((*at++ = bits >> 56) == 0xFF) *at++ = 0;
    return at;
}

INLINE void put(Writer *out, uint32_t bits, int count) {
    out->free -= count;
    if (out->free >= 0) {
        out->bits = out->bits << count | bits;
        return;
    }
    uint64_t full = out->bits << (count + out->free) | bits >> -out->free;
    out->bits = bits; /* with those just written above, which later shifts push out */
    out->free += 64;
    if (RARE(full & ~(full + 0x0101010101010101ull) & 0x8080808080808080ull)) { /* perhaps an FF */
        out->at = put_bytes(out->at, full, 8);
        return;
    }
    full = __builtin_bswap64(full);
    memcpy(out->at, &full, 8);
    out->at += 8;
}

/* A value's bits << 4 | their number. */
static uint32_t bits_of(int value) {
    uint32_t size = value ? 32 - __builtin_clz(abs(value)) : 0;
    return ((value - (value < 0)) & ((1u << size) - 1)) << 4 | size;
}

/* Fill up the last byte with ones, then a marker. */
static void put_marker(Writer *out, int marker) {
    int used = 64 - out->free, more = -used & 7;
    uint64_t bits = used ? out->bits << out->free : 0;
    if (more) bits |= ((1ull << more) - 1) << (out->free - more);
    out->at = put_bytes(out->at, bits, (used + more) / 8);
    out->bits = 0, out->free = 64;
    *out->at++ = 0xFF, *out->at++ = marker;
}

/* A block's levels in the order of the file, |level| <= 1023; `mask`: which are not zero. */
typedef struct {
    int16_t levels[64];
    uint64_t mask;
} Block;

/* A block's codes. previous: the first level of the block before of its component. */
APART void put_block(Writer *to, const Block *block, int *previous, const Codes *codes) {
    Writer out = *to;
    const uint32_t *value = codes->value + 1023;
    const int16_t *level = block->levels;
    uint32_t bits = bits_of(*level - *previous), code = codes->first[bits & 15];
    *previous = *level;
    put(&out, code >> 5 | bits >> 4, code & 31);
    for (uint64_t mask = block->mask >> 1; mask;) {
        uint64_t run = __builtin_ctzll(mask);
        level += run + 1;
        mask = mask >> run >> 1;
        for (; RARE(run > 15); run -= 16)
            put(&out, codes->other[0xF0] >> 5, codes->other[0xF0] & 31);
        bits = value[*level];
        code = codes->other[run << 4 | (bits & 15)];
        put(&out, code >> 5 | bits >> 4, code & 31);
    }
    if (level < block->levels + 63) put(&out, codes->other[0] >> 5, codes->other[0] & 31);
    *to = out;
}
