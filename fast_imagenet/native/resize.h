/* Antialiased resize of a box of an image, with the flip for free.
 *
 * Semantics are those of Pillow's resize (triangle filter for bilinear, a = -0.5 for bicubic,
 * widened when shrinking), applied to the cropped box: the filter never reads beside it, as when
 * torchvision crops first and resizes after. Bilinear weighs rows first, in float32 with a single
 * rounding at the end: within 1 level of Pillow, which rounds between its two passes. Bicubic follows
 * Pillow's order (columns first, rounded and clipped between), because its negative weights
 * overshoot and the clip between the passes shows. Area is the mean over the source area under each
 * output pixel, as OpenCV's INTER_AREA that FFCV resizes with; a box that is enlarged is
 * interpolated linearly.
 *
 * Source: Pillow, src/libImaging/Resample.c (precompute_coeffs); OpenCV, resize.cpp
 * (computeResizeAreaTab).
 */

enum { BILINEAR = 0, BICUBIC = 1, AREA = 2 };

/* Where pixels come from. get: the row y, RGBX: at `room`, which has space for the pixels of a row
 * and VECTOR more, or where it already lies, readable for 4 pixels behind its end. Rows are asked
 * for in increasing order, each once. */
typedef struct Rows Rows;
struct Rows {
    const uint8_t *(*get)(Rows *, int64_t y, uint8_t *room);
};

/* What is resized: rows of `row_pixels` pixels, of which columns [low, high) of rows [low, high) may
 * be read; box: top, left, height, width within them. */
typedef struct {
    int64_t row_pixels, rows[2], columns[2];
    double box[4];
    int64_t out_height, out_width;
    int flip, method;
} Resize;

/* ==== Taps ==================================================================================== */

/* Where every output position reads, and with which weights: first[x] + k times
 * weights[x * stride + k], for k below count[x] (the weights behind are zero, up to `most`). */
typedef struct {
    int32_t *first, *count;
    float *weights;
    int64_t stride, most;
} Taps;

/* One dimension of a box: source pixels [low, high) may be read. */
typedef struct {
    double start, length;
    int64_t low, high, out;
} Axis;

static Axis axis_of(const Resize *task, int k) {
    return (Axis){task->box[k], task->box[k + 2], (k ? task->columns : task->rows)[0],
                  (k ? task->columns : task->rows)[1], k ? task->out_width : task->out_height};
}

INLINE int64_t floor_of(double x) { return (int64_t)x - (x < (double)(int64_t)x); }

INLINE int64_t clip_index(int64_t value, int64_t low, int64_t high) {
    return value < low ? low : value > high ? high : value;
}

INLINE double filter(double x, int method) {
    x = x < 0 ? -x : x;
    if (method != BICUBIC) return x < 1 ? 1 - x : 0;
    if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
    return x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0;
}

/* The most taps that an output position can have. */
static int64_t most_taps(const Axis *axis, int method) {
    double scale = axis->length / (double)axis->out, stretch = scale > 1 ? scale : 1;
    int64_t wide = 2 * floor_of(stretch * (method == BICUBIC ? 2 : 1)) + 4;
    return wide < axis->high - axis->low ? wide : axis->high - axis->low;
}

/* The weights of output position x, whose sum becomes 1. */
static void set_taps(const Axis *axis, int method, int64_t x, int32_t *first, int32_t *count,
                     float *weights) {
    double scale = axis->length / (double)axis->out, stretch = scale > 1 ? scale : 1;
    double center = axis->start + ((double)x + 0.5) * scale, total = 0;
    double support = stretch * (method == BICUBIC ? 2 : 1), inverse = 1 / stretch;
    double left = center - support + 0.5, right = center + support + 0.5;
    int is_area = method == AREA && scale > 1;
    if (is_area) { /* the pixels that it touches; beyond 1e-3 of one, as OpenCV */
        left = axis->start + (double)x * scale, right = axis->start + (double)(x + 1) * scale;
    }
    int64_t begin = floor_of(is_area ? left + 1e-3 : left);
    int64_t end = is_area ? -floor_of(1e-3 - right) : floor_of(right);
    begin = clip_index(begin, axis->low, axis->high - 1);
    end = clip_index(end, begin + 1, axis->high);
    *first = (int32_t)begin, *count = (int32_t)(end - begin);
    for (int64_t pixel = begin; pixel < end; pixel++) {
        double weight, from = (double)pixel, to = from + 1;
        if (is_area)
            weight = (to < right ? to : right) - (from > left ? from : left);
        else
            weight = filter((from - center + 0.5) * inverse, method);
        weight = is_area && weight < 0 ? 0 : weight;
        total += weight;
        weights[pixel - begin] = (float)weight;
    }
    /* A box narrower than a pixel may leave no weight at all: read the nearest pixel. */
    for (int64_t k = 0; k < end - begin; k++)
        weights[k] = total != 0 ? (float)(weights[k] / total) : 1.0f / (float)(end - begin);
}

/* All positions, mirrored with `flip`, and three more that repeat the last. */
static void fill_taps(const Axis *axis, int method, int flip, Taps *taps) {
    memset(taps->weights, 0, (size_t)((axis->out + 3) * taps->stride) * sizeof(float));
    taps->most = 1;
    for (int64_t x = 0; x < axis->out + 3; x++) {
        int64_t position = x < axis->out ? x : axis->out - 1;
        position = flip ? axis->out - 1 - position : position;
        float *weights = taps->weights + x * taps->stride;
        set_taps(axis, method, position, taps->first + x, taps->count + x, weights);
        if (taps->count[x] > taps->most) taps->most = taps->count[x];
    }
}

/* Moves windows of `most` taps that would end behind `high`. */
static void keep_inside(Taps *taps, int64_t out, int64_t high) {
    for (int64_t x = 0; x < out + 3; x++) {
        int64_t beyond = taps->first[x] + taps->most - high;
        float *weights = taps->weights + x * taps->stride;
        if (beyond <= 0) continue;
        memmove(weights + beyond, weights, (size_t)taps->count[x] * sizeof(float));
        memset(weights, 0, (size_t)beyond * sizeof(float));
        taps->first[x] -= (int32_t)beyond;
    }
}

/* One tap per position, itself. */
static void set_unit(Taps *taps, int64_t out) {
    for (int64_t x = 0; x < out + 3; x++) {
        taps->first[x] = (int32_t)(x < out ? x : out - 1);
        taps->count[x] = 1, taps->weights[x] = 1;
    }
    taps->most = 1;
}

/* ==== Passes ================================================================================== */

/* QUARTERS rows go through the passes together. Between them stand float32, for every column a vector
 * of the four channels of each of the rows: so a tap is one load and one multiply-add. */

/* A row of `columns` pixels, the weighted sum of `count` lines, into quarter 0 of `mixed`. */
INLINE void mix_lines(const uint8_t *const *lines, const float *weights, int64_t columns,
                      float *mixed, const int64_t count) {
    for (int64_t x = 0; x < columns; x += QUARTERS, mixed += 4 * QUARTERS * QUARTERS) {
        Floats sum = all(weights[0]) * floats(lines[0] + 4 * x);
        for (int64_t k = 1; k < count; k++)
            sum = fused(all(weights[k]), floats(lines[k] + 4 * x), sum);
#define STORE_COLUMN(q) *(Quarter *)(mixed + 4 * QUARTERS * q) = QUARTER(sum, q);
        EACH_QUARTER(STORE_COLUMN)
    }
}

#define MIX(count) mix_lines(lines, weights, columns, mixed, count)
static void mix_rows(const uint8_t *const *lines, const float *weights, int64_t count,
                     int64_t columns, float *mixed) {
    switch (count) {
    case 1: MIX(1); break;
    case 2: MIX(2); break;
    case 3: MIX(3); break;
    case 4: MIX(4); break;
    case 5: MIX(5); break;
    case 6: MIX(6); break;
    default: MIX(count);
    }
}

/* Four pixels of every row from `most` columns each, rounded and clipped: RGBX. */
INLINE Int16s mix_four(const float *mixed, const Taps *taps, int64_t x, const int64_t most) {
    Int32s levels[4];
    for (int i = 0; i < 4; i++) {
        const float *columns = mixed + 4 * QUARTERS * (int64_t)taps->first[x + i];
        const float *weights = taps->weights + (x + i) * taps->stride;
        Floats sum = all(0.5f);
        for (int64_t k = 0; k < most; k++)
            sum = fused(all(weights[k]), *(const Floats *)(columns + 4 * QUARTERS * k), sum);
        levels[i] = __builtin_convertvector(sum, Int32s);
    }
    return narrow16_unsigned(narrow32(levels[0], levels[1]), narrow32(levels[2], levels[3]));
}

/* QUARTERS rows of `width` pixels; `mixed` belongs to column 0. As RGB, not a byte behind them is
 * written; as RGBX, up to the next multiple of four pixels. */
INLINE void mix_by(const float *mixed, const Taps *taps, int64_t width, int is_rgb,
                   uint8_t *const to[QUARTERS], const int64_t most) {
    for (int64_t x = 0; x < width; x += 4) {
        Int16s pixels = mix_four(mixed, taps, x, most);
        if (!is_rgb) {
#define STORE_RGBX(q) *(Quarter *)(to[q] + 4 * x) = QUARTER(pixels, q);
            EACH_QUARTER(STORE_RGBX)
            continue;
        }
        pixels = drop_fourths(pixels);
        int64_t left = 3 * (width - x);
        if (left >= 16) { /* four bytes too many: the next pixels overwrite them */
#define STORE_RGB(q) *(Quarter *)(to[q] + 3 * x) = QUARTER(pixels, q);
            EACH_QUARTER(STORE_RGB)
            continue;
        }
        for (int q = 0; q < QUARTERS; q++)
            memcpy(to[q] + 3 * x, (uint8_t *)&pixels + 16 * q, (size_t)(left < 12 ? left : 12));
    }
}

#define MIX_BY(most) mix_by(mixed, taps, width, is_rgb, to, most)
static void mix_columns(const float *mixed, const Taps *taps, int64_t width, int is_rgb,
                        uint8_t *const to[QUARTERS]) {
    switch (taps->most) {
    case 1: MIX_BY(1); break;
    case 2: MIX_BY(2); break;
    case 3: MIX_BY(3); break;
    case 4: MIX_BY(4); break;
    case 5: MIX_BY(5); break;
    case 6: MIX_BY(6); break;
    default: MIX_BY(taps->most);
    }
}

/* ==== Rows ==================================================================================== */

typedef struct {
    const Resize *task;
    Rows *rows;
    Taps down, across, unit;      /* unit: one tap per column, itself */
    const uint8_t **lines, **used; /* rows in a ring, and those of one output row */
    int64_t ring, ready;          /* its length; rows before `ready` are or were in it */
    uint8_t *rooms, *spare;       /* of the ring, then QUARTERS; a row that nobody reads */
    int64_t room_bytes;
    float *mixed, *source;        /* between the passes: of output rows; of bicubic's source rows */
} Work;

static void *take_bytes(uintptr_t *at, int64_t bytes) {
    uintptr_t taken = *at;
    *at += (uintptr_t)(bytes + 63) / 64 * 64;
    return (void *)taken;
}

static void take_taps(uintptr_t *at, Taps *taps, int64_t out, int64_t stride) {
    taps->stride = stride;
    taps->first = take_bytes(at, 4 * (out + 3));
    taps->count = take_bytes(at, 4 * (out + 3));
    taps->weights = take_bytes(at, 4 * (out + 3) * stride);
}

/* Divides a workspace that begins at an address; returns its end. */
static uintptr_t divide(Work *work, const Resize *task, uintptr_t at) {
    Axis down = axis_of(task, 0), across = axis_of(task, 1);
    int64_t width = task->columns[1] - task->columns[0];
    int64_t pixels = task->row_pixels > task->out_width ? task->row_pixels : task->out_width;
    *work = (Work){.task = task, .room_bytes = (4 * (pixels + VECTOR) + 63) / 64 * 64};
    take_taps(&at, &work->down, task->out_height, most_taps(&down, task->method));
    take_taps(&at, &work->across, task->out_width, most_taps(&across, task->method));
    if (task->method == BICUBIC) take_taps(&at, &work->unit, task->out_width, 1);
    work->ring = work->down.stride + QUARTERS;
    work->lines = take_bytes(&at, 8 * work->ring);
    work->used = take_bytes(&at, 8 * work->ring);
    work->rooms = take_bytes(&at, (work->ring + QUARTERS) * work->room_bytes);
    work->spare = take_bytes(&at, work->room_bytes);
    int64_t mixed = task->method == BICUBIC ? task->out_width : width;
    work->mixed = take_bytes(&at, 16 * QUARTERS * (mixed + QUARTERS));
    if (task->method == BICUBIC)
        work->source = take_bytes(&at, 16 * QUARTERS * (width + QUARTERS));
    return at;
}

/* Bytes of workspace that `resize` needs; it begins on a multiple of 64 bytes. */
static int64_t resize_bytes(const Resize *task) {
    Work work;
    return (int64_t)divide(&work, task, 0);
}

/* The next row into the ring, as it comes. */
static void fetch_row(Work *work) {
    int64_t slot = work->ready % work->ring;
    uint8_t *room = work->rooms + slot * work->room_bytes;
    const uint8_t *row = work->rows->get(work->rows, work->ready++, room);
    work->lines[slot] = row + 4 * work->task->columns[0];
}

/* The next QUARTERS rows into the ring, their columns resized. */
static void fetch_resized(Work *work) {
    int64_t columns = work->task->columns[1] - work->task->columns[0];
    const float one = 1;
    uint8_t *to[QUARTERS];
    for (int q = 0; q < QUARTERS; q++, work->ready++) {
        int64_t slot = work->ready % work->ring;
        uint8_t *room = work->rooms + (work->ring + q) * work->room_bytes;
        const uint8_t *row = room;
        if (work->ready < work->task->rows[1])
            row = work->rows->get(work->rows, work->ready, room) + 4 * work->task->columns[0];
        mix_rows(&row, &one, 1, columns, work->source + 4 * q);
        work->lines[slot] = to[q] = work->rooms + slot * work->room_bytes;
    }
    mix_columns(work->source - 4 * QUARTERS * work->task->columns[0], &work->across,
                work->task->out_width, 0, to);
}

/* The weighted sum of the rows under output row y into its quarter of `mixed`. */
static void mix_output_row(Work *work, int64_t y, int64_t columns, float *mixed) {
    int64_t first = work->down.first[y], count = work->down.count[y];
    while (work->ready < first + count)
        work->task->method == BICUBIC ? fetch_resized(work) : fetch_row(work);
    for (int64_t k = 0; k < count; k++) work->used[k] = work->lines[(first + k) % work->ring];
    mix_rows(work->used, work->down.weights + y * work->down.stride, count, columns, mixed);
}

/* out: out_height * out_width pixels of three bytes, contiguous. Nothing is checked here. */
static void resize(const Resize *task, Rows *rows, uint8_t *out, uint8_t *workspace) {
    Work work;
    divide(&work, task, (uintptr_t)workspace);
    work.rows = rows;
    Axis down = axis_of(task, 0), across = axis_of(task, 1);
    fill_taps(&down, task->method, 0, &work.down);
    fill_taps(&across, task->method, task->flip, &work.across);
    keep_inside(&work.across, across.out, across.high);
    if (task->method == BICUBIC) set_unit(&work.unit, task->out_width);
    work.ready = work.down.first[0];
    int is_bicubic = task->method == BICUBIC;
    const Taps *taps = is_bicubic ? &work.unit : &work.across;
    int64_t origin = is_bicubic ? 0 : across.low;
    int64_t columns = is_bicubic ? task->out_width : across.high - across.low;
    for (int64_t y = 0; y < task->out_height; y += QUARTERS) {
        uint8_t *to[QUARTERS];
        for (int q = 0; q < QUARTERS; q++) {
            int64_t row = y + q < task->out_height ? y + q : task->out_height - 1;
            mix_output_row(&work, row, columns, work.mixed + 4 * q);
            to[q] = y + q == row ? out + 3 * row * task->out_width : work.spare;
        }
        mix_columns(work.mixed - 4 * QUARTERS * origin, taps, task->out_width, 1, to);
    }
}
