/* Rows of pixels of four bytes (RGBX; X is written, with anything) from rows of a JPEG's planes.
 *
 * Bit for bit libjpeg's "fancy" chroma interpolation and color conversion. All take n output pixels
 * from an even column on, for `repeat_columns` from a multiple of the factor, and read and write up
 * to the next multiple of VECTOR pixels. Interpolated columns also need the value before the first
 * one; beside the image the caller repeats its edge, as libjpeg does.
 *
 * Source: libjpeg-turbo, jdsample.c, jdcolor.c, jdmrgext.c.
 */

INLINE Int16s thrice(Int16s v) { return v + v + v; }

/* Half as many rows, 4:4:0: weights 3/4 and 1/4; the `bias` is 1 for the upper and 2 for the lower
 * of the two rows that `near` covers. */
static void blend_rows(const uint8_t *near, const uint8_t *far, int bias, uint8_t *out, int64_t n) {
    for (int64_t x = 0; x < n; x += VECTOR / 2) {
        Int16s levels = (thrice(widen(near + x)) + widen(far + x) + (int16_t)bias) >> 2;
        *(HalfUInt8s *)(out + x) = __builtin_convertvector(levels, HalfUInt8s);
    }
}

/* Every value `factor` times. */
static void repeat_columns(const uint8_t *in, int factor, uint8_t *out, int64_t n) {
    for (int64_t x = 0; x < n; x += factor) memset(out + x, in[x / factor], (size_t)factor);
}

/* 16 * QUARTERS pixels from three vectors of bytes, of which each quarter holds 16. */
INLINE void store_pixels(Int16s red, Int16s green, Int16s blue, uint8_t *out) {
    Int16s low = low8(red, green), high = high8(red, green);
    Int16s low_blue = low8(blue, blue), high_blue = high8(blue, blue);
    Int16s v[4] = {low16(low, low_blue), high16(low, low_blue), low16(high, high_blue),
                   high16(high, high_blue)};
    for (int i = 0; i < 4; i += QUARTERS) {
        turn(v + i);
        for (int q = 0; q < QUARTERS; q++) *(Int16s *)(out + 64 * q + 16 * i) = v[i + q];
    }
}

typedef struct {
    Int16s red, green, blue;
} Colors;

/* From luma, and from chroma less 128. 1.402, 1.772, 0.34414 and 0.71414 have 16 binary places in
 * libjpeg; whole parts stand aside to fit 16 bits. With 15 places, as `rounded_product` takes them,
 * red and blue are the same for all 256 values. */
INLINE Colors convert(Int16s y, Int16s cb, Int16s cr) {
    const Int16s by_green = pairs(-22554, 65536 - 46802);
    const Int32s half = (Int32s){0} + 32768;
    Int32s low = (half + products(low16(cb, cr), by_green)) >> 16;
    Int32s high = (half + products(high16(cb, cr), by_green)) >> 16;
    return (Colors){y + (cr + rounded_product(cr, all16(13173))), y - cr + narrow32(low, high),
                    y + cb + (cb + rounded_product(cb, all16(-7471)))};
}

/* A vector of pixels, its halves of every quarter. */
INLINE void convert_both(Int16s y, const Int16s cb[2], const Int16s cr[2], uint8_t *out) {
    const Int16s zero = {0};
    Colors low = convert(low8(y, zero), cb[0], cr[0]), high = convert(high8(y, zero), cb[1], cr[1]);
    store_pixels(narrow16_unsigned(low.red, high.red), narrow16_unsigned(low.green, high.green),
                 narrow16_unsigned(low.blue, high.blue), out);
}

/* From luma and chroma at full width. */
static void color_row(const uint8_t *y, const uint8_t *cb, const uint8_t *cr, uint8_t *out,
                      int64_t n) {
    const Int16s zero = {0};
    for (int64_t x = 0; x < n; x += VECTOR) {
        Int16s b = *(const Int16s *)(cb + x), r = *(const Int16s *)(cr + x);
        Int16s blue[2] = {low8(b, zero) - 128, high8(b, zero) - 128};
        Int16s red[2] = {low8(r, zero) - 128, high8(r, zero) - 128};
        convert_both(*(const Int16s *)(y + x), blue, red, out + 4 * x);
    }
}

/* 3/4 of `near` and 1/4 of `far`, times 4, of n values and at least one more on either side:
 * sums[0] belongs to the value before the first. */
INLINE void sum_rows(const uint8_t *near, const uint8_t *far, int16_t *sums, int64_t n) {
    for (int64_t x = 0; x < n + 2; x += VECTOR / 2)
        *(Int16s *)(sums + x) = thrice(widen(near + x - 1)) + widen(far + x - 1);
}

/* Chroma less 128 of a vector of pixels: the halves of its quarters. even: what is added to sixteen
 * times a value of the even columns before it is rounded down; 15 - even: of the odd ones. */
INLINE void sum_columns(const int16_t *sums, int even, Int16s chroma[2]) {
    Int16s before = *(const Int16s *)sums, here = thrice(*(const Int16s *)(sums + 1));
    Int16s evens = (here + before + all16(even - 16 * 128)) >> 4;
    Int16s odds = (here + *(const Int16s *)(sums + 2) + all16(15 - even - 16 * 128)) >> 4;
    chroma[0] = low16(evens, odds), chroma[1] = high16(evens, odds);
}

/* From half as many columns of chroma, of the row that covers the pixels and the next nearest one
 * (4:2:0: above the upper of the two that it covers, below the lower), or twice the same (4:2:2).
 * even: 8 or, 4:2:2, 7. In pieces that stay in the cache. */
static void color_row_halved(const uint8_t *y, const uint8_t *const cb[2],
                             const uint8_t *const cr[2], int even, uint8_t *out, int64_t n) {
    enum { PIECE = 512 };
    int16_t blue[PIECE + VECTOR], red[PIECE + VECTOR];
    for (int64_t done = 0; done < n; done += 2 * PIECE) {
        int64_t at = done / 2, piece = n - done < 2 * PIECE ? n - done : 2 * PIECE;
        sum_rows(cb[0] + at, cb[1] + at, blue, (piece + VECTOR - 1) / VECTOR * VECTOR / 2);
        sum_rows(cr[0] + at, cr[1] + at, red, (piece + VECTOR - 1) / VECTOR * VECTOR / 2);
        for (int64_t x = 0; x < piece; x += VECTOR) {
            Int16s by_blue[2], by_red[2];
            sum_columns(blue + x / 2, even, by_blue), sum_columns(red + x / 2, even, by_red);
            convert_both(*(const Int16s *)(y + done + x), by_blue, by_red, out + 4 * (done + x));
        }
    }
}

/* From pixels of three bytes; nothing is read or written beyond the last. */
static void rgb_row(const uint8_t *rgb, uint8_t *out, int64_t n) {
    for (int64_t x = 0; x < n - 1; x++) memcpy(out + 4 * x, rgb + 3 * x, 4);
    for (int c = 0; c < 4; c++) out[4 * (n - 1) + c] = rgb[3 * (n - 1) + (c < 3 ? c : 2)];
}
