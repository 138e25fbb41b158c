/* The inverse transform of 8 x 8 blocks, QUARTERS of them side by side, one in each quarter.
 *
 * Bit for bit libjpeg's accurate integer transform in its x86 form (jidctint: 16-bit sums wrap,
 * narrowing saturates). Constants have 13 binary places: 8192 is 1, 9633 is sqrt(2) cos(3 pi / 16),
 * and so on as there; sums of two of them are written as such or, 4433 + 6270 and 4433 - 15137, as
 * 10703 and -10704.
 *
 * Source: Loeffler, Ligtenberg and Moschytz, ICASSP 1989; libjpeg-turbo, jidctint.c.
 */

/* Sums of 32 bits for the lanes of an Int16s: of the lower and the upper halves of its quarters. */
typedef struct {
    Int32s low, high;
} Sums;

INLINE Sums weigh(Int16s a, Int16s b, int by_a, int by_b) {
    Int16s factors = pairs(by_a, by_b);
    return (Sums){products(low16(a, b), factors), products(high16(a, b), factors)};
}

INLINE Sums add_weighed(Sums sums, Int16s a, Int16s b, int by_a, int by_b) {
    Sums more = weigh(a, b, by_a, by_b);
    return (Sums){sums.low + more.low, sums.high + more.high};
}

/* The outputs k and 7 - k. */
INLINE void finish(Int16s *x, int k, Sums even, Sums odd, int shift) {
    x[k] = narrow32((even.low + odd.low) >> shift, (even.high + odd.high) >> shift);
    x[7 - k] = narrow32((even.low - odd.low) >> shift, (even.high - odd.high) >> shift);
}

/* One dimension: eight inputs to eight outputs in every lane. half: 1 << (shift - 1), as
 * rounding * unit, so that both fit 16 bits. */
INLINE void transform_lanes(Int16s *x, int shift, int rounding, int unit) {
    Int16s units = all16(unit), sum = x[0] + x[4], difference = x[0] - x[4];
    Sums even0 = weigh(sum, units, 8192, rounding);
    Sums even1 = weigh(difference, units, 8192, rounding);
    Sums outer0 = add_weighed(even0, x[2], x[6], 10703, 4433);
    Sums outer3 = add_weighed(even0, x[2], x[6], -10703, -4433);
    Sums outer1 = add_weighed(even1, x[2], x[6], 4433, -10704);
    Sums outer2 = add_weighed(even1, x[2], x[6], -4433, 10704);
    Int16s z3 = x[7] + x[3], z4 = x[5] + x[1];
    Sums turned3 = weigh(z3, z4, 9633 - 16069, 9633), turned4 = weigh(z3, z4, 9633, 9633 - 3196);
    Sums odd0 = add_weighed(turned3, x[7], x[1], 2446 - 7373, -7373);
    Sums odd3 = add_weighed(turned4, x[7], x[1], -7373, 12299 - 7373);
    Sums odd1 = add_weighed(turned4, x[5], x[3], 16819 - 20995, -20995);
    Sums odd2 = add_weighed(turned3, x[5], x[3], -20995, 25172 - 20995);
    finish(x, 0, outer0, odd3, shift), finish(x, 1, outer1, odd2, shift);
    finish(x, 2, outer2, odd1, shift), finish(x, 3, outer3, odd0, shift);
}

/* Rows to columns of every block. */
INLINE void turn_blocks(Int16s *x) {
    Int16s a[8], b[8];
    for (int i = 0; i < 8; i += 2) a[i] = low16(x[i], x[i + 1]), a[i + 1] = high16(x[i], x[i + 1]);
    for (int i = 0; i < 8; i += 4) {
        b[i] = low32(a[i], a[i + 2]), b[i + 1] = high32(a[i], a[i + 2]);
        b[i + 2] = low32(a[i + 1], a[i + 3]), b[i + 3] = high32(a[i + 1], a[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        x[2 * i] = low64(b[i], b[i + 4]);
        x[2 * i + 1] = high64(b[i], b[i + 4]);
    }
}

/* Columns to bytes, clipped, then to rows, two in each of x[0..3]. A byte's index has 3 bits of the
 * column and 3 of the row; every round of interleaving rotates them by one, three exchange them. */
INLINE void turn_to_bytes(Int16s *x) {
    for (int i = 0; i < 4; i++) /* -0x7f80 is 8080 in hexadecimal: 128 is added to both bytes */
        x[i] = narrow16(x[2 * i], x[2 * i + 1]) ^ all16(-0x7f80);
    for (int round = 0; round < 3; round++) {
        Int16s first = x[0], second = x[1];
        x[0] = low8(first, x[2]), x[1] = high8(first, x[2]);
        x[2] = low8(second, x[3]), x[3] = high8(second, x[3]);
    }
}

/* Inverse transform of QUARTERS blocks.
 *
 * blocks: 64 coefficients each, row by row, before they are multiplied by `steps`; 16-byte aligned,
 * cleared when they have been read: a pass of its own over them would cost 1 % of a crop.
 * steps: row by row, each row QUARTERS times. to: the first pixel of each block's eight rows,
 * `pitch` bytes apart; blocks may share one. Returns bits set where a product of a block's first
 * row is beyond 14 bits, as none of an image is: there libjpeg's shortcut for flat columns wraps,
 * and this does not. */
static Int16s transform_blocks(int16_t *const blocks[QUARTERS], const int16_t *steps,
                               uint8_t *const to[QUARTERS], int64_t pitch) {
    Int16s x[8];
    for (int row = 0; row < 8; row++) {
        const void *from[QUARTERS];
        for (int q = 0; q < QUARTERS; q++) from[q] = blocks[q] + 8 * row;
        x[row] = gather(from) * *(const Int16s *)(steps + 8 * QUARTERS * row);
        for (int q = 0; q < QUARTERS; q++) *(Quarter *)(blocks[q] + 8 * row) = (Quarter){0};
    }
    Int16s beyond = (x[0] << 2 >> 2) ^ x[0];
    transform_lanes(x, 11, 1 << 10, 1); /* 2 of the 13 binary places stay, as in libjpeg */
    turn_blocks(x);
    transform_lanes(x, 18, 1 << 13, 1 << 4); /* 13, those 2, and 3 for the division by 8 */
    turn_to_bytes(x);
    for (int row = 0; row < 8; row += 2) {
#define STORE_ROWS(q)                                                                              \
    {                                                                                              \
        Quarter rows = QUARTER(x[row / 2], q);                                                     \
        memcpy(to[q] + row * pitch, &rows, 8);                                                     \
        memcpy(to[q] + (row + 1) * pitch, (uint8_t *)&rows + 8, 8);                                \
    }
        EACH_QUARTER(STORE_ROWS)
    }
    return beyond;
}
