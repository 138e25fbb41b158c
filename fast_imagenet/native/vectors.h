/* Vectors of one or two quarters of 16 bytes, by what the compiler may use.
 *
 * AVX2 has two quarters in a vector, portable C (also with -DPORTABLE) one. AVX-512 would have
 * four, which made no crop faster (docs/LOG.md); with its flags the compiler has its other
 * instructions. Most instructions of AVX2 work within quarters: code that keeps to quarters is the
 * same for both. Lane-wise arithmetic (+ - * >> & |) is the compiler's own, on the types below; the
 * functions are what C has no operator for. Integer results do not depend on the path; `fused`
 * rounds once in AVX2, twice in portable C.
 */
#include "common.h"

#if defined(__AVX2__) && defined(__FMA__) && !defined(PORTABLE)
#include <immintrin.h>
#define QUARTERS 2
#else
#define QUARTERS 1
#endif
#define VECTOR (16 * QUARTERS) /* bytes */

#define LANES(bytes) __attribute__((vector_size(bytes), aligned(1), may_alias))
typedef int16_t Int16s LANES(VECTOR);
typedef int32_t Int32s LANES(VECTOR);
typedef uint8_t UInt8s LANES(VECTOR);
typedef uint8_t HalfUInt8s LANES(VECTOR / 2); /* as many lanes as Int16s */
typedef float Floats LANES(VECTOR);
typedef uint8_t Quarter LANES(16);

/* Two 16-bit numbers in turn, for `products`. */
INLINE Int16s pairs(int first, int second) {
    return (Int16s)((Int32s){0} + (int32_t)((uint32_t)second << 16 | (first & 0xffff)));
}
INLINE Int16s all16(int value) { return (Int16s){0} + (int16_t)value; }
INLINE Floats all(float value) { return value - (Floats){0}; }

/* Bytes as 16-bit lanes, in order. */
INLINE Int16s widen(const uint8_t *from) {
    return __builtin_convertvector(*(const HalfUInt8s *)from, Int16s);
}

#if QUARTERS == 2
#define EACH_QUARTER(DO) DO(0) DO(1)
#define QUARTER(v, q) (Quarter) _mm256_extracti128_si256((__m256i)(v), q)
#define TWO(name, instruction, In, Out)                                                            \
    INLINE Out name(In a, In b) { return (Out)_mm256_##instruction((__m256i)a, (__m256i)b); }

/* Lanes of a and b in turn: those of the lower, or of the upper half of every quarter. */
TWO(low8, unpacklo_epi8, Int16s, Int16s)
TWO(high8, unpackhi_epi8, Int16s, Int16s)
TWO(low16, unpacklo_epi16, Int16s, Int16s)
TWO(high16, unpackhi_epi16, Int16s, Int16s)
TWO(low32, unpacklo_epi32, Int16s, Int16s)
TWO(high32, unpackhi_epi32, Int16s, Int16s)
TWO(low64, unpacklo_epi64, Int16s, Int16s)
TWO(high64, unpackhi_epi64, Int16s, Int16s)
/* In every quarter the lanes of a, then those of b, clipped to half their width. */
TWO(narrow32, packs_epi32, Int32s, Int16s)
TWO(narrow16, packs_epi16, Int16s, Int16s)
TWO(narrow16_unsigned, packus_epi16, Int16s, Int16s)
/* Sums of the products of two neighbors: of 2 k and 2 k + 1. */
TWO(products, madd_epi16, Int16s, Int32s)
/* (a * b + 0x4000) >> 15 */
TWO(rounded_product, mulhrs_epi16, Int16s, Int16s)

/* RGBX to RGB: of every quarter the first 12 bytes remain in use. */
INLINE Int16s drop_fourths(Int16s pixels) {
    const __m128i order = _mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1);
    return (Int16s)_mm256_shuffle_epi8((__m256i)pixels, _mm256_broadcastsi128_si256(order));
}

/* a * b + c */
INLINE Floats fused(Floats a, Floats b, Floats c) {
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}

/* 4 * QUARTERS bytes. */
INLINE Floats floats(const uint8_t *from) {
    __m128i bytes = _mm_loadl_epi64((const __m128i *)from);
    return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
}

/* 16 bytes from each address. */
INLINE Int16s gather(const void *const from[QUARTERS]) {
    return (Int16s)_mm256_loadu2_m128i(from[1], from[0]);
}

/* Quarter i of vector k becomes quarter k of vector i. */
INLINE void turn(Int16s v[QUARTERS]) {
    __m256i low = _mm256_permute2x128_si256((__m256i)v[0], (__m256i)v[1], 0x20);
    v[1] = (Int16s)_mm256_permute2x128_si256((__m256i)v[0], (__m256i)v[1], 0x31);
    v[0] = (Int16s)low;
}

#else
#define EACH_QUARTER(DO) DO(0)
#define QUARTER(v, q) (Quarter)(v)

#define SHUFFLE(Type, a, b, ...)                                                                   \
    (Int16s) __builtin_shuffle((Type)(a), (Type)(b), (Type){__VA_ARGS__})
typedef int64_t Int64s LANES(VECTOR);
#define TURNS(name, Type, ...)                                                                     \
    INLINE Int16s name(Int16s a, Int16s b) { return SHUFFLE(Type, a, b, __VA_ARGS__); }
TURNS(low8, UInt8s, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
TURNS(high8, UInt8s, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
TURNS(low16, Int16s, 0, 8, 1, 9, 2, 10, 3, 11)
TURNS(high16, Int16s, 4, 12, 5, 13, 6, 14, 7, 15)
TURNS(low32, Int32s, 0, 4, 1, 5)
TURNS(high32, Int32s, 2, 6, 3, 7)
TURNS(low64, Int64s, 0, 2)
TURNS(high64, Int64s, 1, 3)

#define CLIP(v, low, high)                                                                         \
    ((v) & ((v) >= (low)) & ((v) <= (high))) | (((v) < (low)) & (low)) | (((v) > (high)) & (high))
INLINE Int16s narrow32(Int32s a, Int32s b) {
    a = CLIP(a, -32768, 32767), b = CLIP(b, -32768, 32767);
    return SHUFFLE(Int16s, a, b, 0, 2, 4, 6, 8, 10, 12, 14);
}
INLINE Int16s even_bytes(Int16s a, Int16s b) {
    return SHUFFLE(UInt8s, a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
}
INLINE Int16s narrow16(Int16s a, Int16s b) {
    return even_bytes(CLIP(a, -128, 127), CLIP(b, -128, 127));
}
INLINE Int16s narrow16_unsigned(Int16s a, Int16s b) {
    return even_bytes(CLIP(a, 0, 255), CLIP(b, 0, 255));
}
INLINE Int32s even_products(Int16s a, Int16s b) {
    return ((Int32s)a << 16 >> 16) * ((Int32s)b << 16 >> 16);
}
INLINE Int32s odd_products(Int16s a, Int16s b) { return ((Int32s)a >> 16) * ((Int32s)b >> 16); }
INLINE Int32s products(Int16s a, Int16s b) { return even_products(a, b) + odd_products(a, b); }
INLINE Int16s rounded_product(Int16s a, Int16s b) {
    Int32s even = (even_products(a, b) + 0x4000) >> 15, odd = (odd_products(a, b) + 0x4000) >> 15;
    return (Int16s)((even & 0xffff) | odd << 16);
}
INLINE Int16s drop_fourths(Int16s pixels) {
    uint64_t first, second;
    memcpy(&first, &pixels, 8), memcpy(&second, (uint8_t *)&pixels + 8, 8);
    first = (first & 0xffffff) | (first >> 32 & 0xffffff) << 24;
    second = (second & 0xffffff) | (second >> 32 & 0xffffff) << 24;
    return (Int16s)(Int64s){(int64_t)(first | second << 48), (int64_t)(second >> 16)};
}
INLINE Floats fused(Floats a, Floats b, Floats c) { return a * b + c; }
INLINE Floats floats(const uint8_t *from) {
    int32_t four;
    memcpy(&four, from, 4);
    Int16s words = low8((Int16s)(Int32s){four}, (Int16s){0});
    return __builtin_convertvector((Int32s)low16(words, (Int16s){0}), Floats);
}
INLINE Int16s gather(const void *const from[QUARTERS]) { return *(const Int16s *)from[0]; }
INLINE void turn(Int16s v[QUARTERS]) { (void)v; }
#endif
