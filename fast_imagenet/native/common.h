/* What all files use: words for the compiler, and memory. */
#pragma once
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
/* Functions that stay calls: inlined into one, they spill registers and are not vectorized. */
#define APART static __attribute__((noinline))
#define RARE(condition) __builtin_expect(!!(condition), 0)

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

/* Bytes taken in addition, so that a slightly larger image needs no new memory. */
#ifndef SPARE
#define SPARE(size) ((size) / 4)
#endif

/* Memory that grows and is kept from one image to the next: fresh one would cost page faults. */
typedef struct {
    uint8_t *bytes;
    int64_t size;
} Room;

/* At least `size` bytes, from a cache line on; NULL: there is no memory. */
static uint8_t *take_room(Room *room, int64_t size) {
    if (room->size < size) {
        free(room->bytes);
        room->size = (size + SPARE(size) + 63) & ~63ll;
        room->bytes = aligned_alloc(64, room->size);
        if (room->bytes) memset(room->bytes, 0, room->size); /* vectors read beyond rows */
        else room->size = 0;
    }
    return room->bytes;
}

/* One of several arrays in a room: the address of the pointer to it, and its size. */
typedef struct {
    void *pointer;
    int64_t bytes;
} Array;

/* Place all arrays, each from a cache line on. Returns 0: there is no memory. */
static int place_arrays(Room *room, const Array *arrays, int count) {
    int64_t bytes = 0;
    for (int i = 0; i < count; i++) bytes += (arrays[i].bytes + 63) & ~63ll;
    uint8_t *at = take_room(room, bytes);
    for (int i = 0; at && i < count; at += (arrays[i++].bytes + 63) & ~63ll)
        memcpy(arrays[i].pointer, &at, sizeof at);
    return at != NULL;
}
#define PLACE(room, ...)                                                                           \
    place_arrays(room, (Array[]){__VA_ARGS__}, sizeof (Array[]){__VA_ARGS__} / sizeof(Array))
