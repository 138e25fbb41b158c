/* The pixel half of the decoder for test_pixels.py, one function per step. */
#define SPARE(size) 0
#include "vectors.h"
#include "transform.h"
#include "color.h"
#include "resize.h"

int quarters(void) { return QUARTERS; }

/* n blocks side by side; those missing in the last vector are the last block again. */
int transform(int16_t *blocks, const int16_t *steps, uint8_t *to, int64_t n) {
    Int16s beyond = {0}, none = {0};
    int16_t spread[64 * QUARTERS]; /* every row QUARTERS times */
    for (int i = 0; i < 64 * QUARTERS; i++) spread[i] = steps[i / (8 * QUARTERS) * 8 + i % 8];
    for (int64_t i = 0; i < n; i += QUARTERS) {
        int16_t *from[QUARTERS];
        uint8_t *pixels[QUARTERS];
        for (int q = 0; q < QUARTERS; q++) {
            int64_t block = i + q < n ? i + q : n - 1;
            from[q] = blocks + 64 * block, pixels[q] = to + 8 * block;
        }
        beyond |= transform_blocks(from, spread, pixels, 8 * n);
    }
    return memcmp(&beyond, &none, sizeof none) != 0;
}

/* Pixels from rows of planes. kind: chroma values per luma column and row, "11" to "42", or 0 gray.
 */
void color(int kind, const uint8_t *y, const uint8_t *const chroma[4], int is_lower, uint8_t *out,
           int64_t n) {
    uint8_t *full[2] = {malloc(n + VECTOR), malloc(n + VECTOR)};
    for (int c = 0; c < 2; c++) {
        const uint8_t *near = chroma[2 * c], *far = chroma[2 * c + 1];
        if (!kind) memset(full[c], 128, n + VECTOR);
        if (kind == 12) blend_rows(near, far, is_lower ? 2 : 1, full[c], n);
        if (kind == 41 || kind == 11) repeat_columns(near, kind / 10, full[c], n);
    }
    const uint8_t *same[2][2] = {{chroma[0], chroma[0]}, {chroma[2], chroma[2]}};
    if (kind == 22) color_row_halved(y, chroma, chroma + 2, 8, out, n);
    else if (kind == 21) color_row_halved(y, same[0], same[1], 7, out, n);
    else color_row(y, full[0], full[1], out, n);
    free(full[0]), free(full[1]);
}

typedef struct {
    Rows rows;
    const uint8_t *rgb;
    int64_t pixels, last; /* of a row; the row asked for last */
    int is_wrong;
} Image;

static const uint8_t *next_row(Rows *rows, int64_t y, uint8_t *room) {
    Image *image = (Image *)rows;
    image->is_wrong |= y <= image->last;
    image->last = y;
    rgb_row(image->rgb + 3 * y * image->pixels, room, image->pixels);
    return room;
}

/* numbers: pixels of a row, height and width of the output, flip, method. Returns -1 where rows
 * were asked for twice or backwards. */
int resize_box(const uint8_t *rgb, const int64_t *numbers, const double *box, uint8_t *out) {
    Resize task = {numbers[0],
                   {box[0], box[1], box[2], box[3]},
                   {numbers[1], numbers[2]},
                   (int)numbers[3],
                   (int)numbers[4]};
    Image image = {{next_row}, rgb, numbers[0], -1, 0};
    Room room = {0};
    Work work;
    lay_out_work(&work, &task, &room);
    memset(room.bytes, 0xff, room.size); /* floats that are not numbers */
    int is_done = resize(&task, &image.rows, out, &room);
    free(room.bytes);
    return image.is_wrong || !is_done ? -1 : 0;
}

#ifdef SANITIZED /* a program: random work in blocks of memory that end where they must */
static uint64_t state = 1;

static int64_t random_below(int64_t limit) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (int64_t)((state >> 33) % (uint64_t)limit);
}

static uint8_t *noise(int64_t bytes) {
    uint8_t *block = aligned_alloc(16, (bytes + 15) / 16 * 16);
    for (int64_t i = 0; i < bytes; i++) block[i] = (uint8_t)random_below(256);
    return block;
}

static void try_transform(void) {
    int64_t n = 1 + random_below(9);
    uint8_t *blocks = noise(128 * n), *steps = noise(128), *to = malloc(64 * n);
    transform((int16_t *)blocks, (int16_t *)steps, to, n);
    free(blocks), free(steps), free(to);
}

static void try_color(void) {
    const int kinds[] = {0, 11, 12, 21, 22, 41};
    int64_t n = 1 + random_below(1500), whole = (n + VECTOR - 1) / VECTOR * VECTOR;
    uint8_t *y = noise(whole), *out = malloc(4 * whole), *rows[4];
    const uint8_t *chroma[4];
    int kind = kinds[random_below(6)], columns = (int)n / (kind >= 40 ? 4 : kind >= 20 ? 2 : 1) + 1;
    for (int c = 0; c < 4; c++) chroma[c] = (rows[c] = noise(1 + columns + VECTOR)) + 1;
    color(kind, y, chroma, (int)random_below(2), out, n);
    for (int c = 0; c < 4; c++) free(rows[c]);
    free(y), free(out);
}

static int try_resize(void) {
    int64_t wide = 1 + random_below(random_below(9) ? 90 : 3000),
            most = random_below(4) ? 70 : 2000;
    int64_t tall = 1 + random_below(wide > 90 ? 5 : most);
    int64_t top = random_below(tall), bottom = top + 1 + random_below(tall - top);
    int64_t left = random_below(wide), right = left + 1 + random_below(wide - left);
    int64_t numbers[] = {wide, 1 + random_below(90), 1 + random_below(90), random_below(2),
                         random_below(3)};
    double box[] = {(double)top, (double)left, (double)(bottom - top), (double)(right - left)};
    if (random_below(2)) { /* not on whole pixels */
        box[0] += (double)random_below(100) / 101, box[1] += (double)random_below(100) / 101;
        box[2] = ((double)bottom - box[0]) * (double)(1 + random_below(999)) / 1000;
        box[3] = ((double)right - box[1]) * (double)(1 + random_below(999)) / 1000;
    }
    uint8_t *rgb = malloc(3 * wide * tall), *out = malloc(3 * numbers[1] * numbers[2]);
    memset(rgb, 7, 3 * wide * tall);
    int wrong = resize_box(rgb, numbers, box, out);
    for (int64_t i = 0; i < 3 * numbers[1] * numbers[2]; i++) wrong |= out[i] != 7;
    free(rgb), free(out);
    return wrong;
}

int main(void) {
    int wrong = 0;
    for (int i = 0; i < 1000; i++) try_transform(), try_color(), wrong |= try_resize();
    return wrong != 0;
}
#endif
