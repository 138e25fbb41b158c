/* The whole native library, compiled once for each kind of processor: setup.py has the flags. */
#include "huffman.h"
#include "header.h"
#include "recode.c"
#include "decode.c"

/* Hash of the sources: __init__.py refuses a library that was compiled from others. */
const char *fingerprint(void) { return NATIVE_FINGERPRINT; }

/* The best library for this processor: 0 plain, 1 AVX2, 2 AVX-512. What it must support is all that
 * setup.py's flags allow the compiler to use. */
int supported_path(void) {
    int path = 0;
#if defined __x86_64__
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
        __builtin_cpu_supports("popcnt"))
        path = 1;
    if (path == 1 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        path = 2;
#endif
    return path;
}
