/* Antialiased resize of a box of an image; a flip reverses the weights of the columns.
 *
 * Semantics are those of Pillow's resize (triangle filter for bilinear, a = -0.5 for bicubic,
 * widened when shrinking), applied to the cropped box: the filter never reads beside it, as when
 * torchvision crops first and resizes after. Bilinear weighs rows first, in float32 with a single
 * rounding at the end: within 1 level of Pillow, which rounds between its two passes. Bicubic
 * follows Pillow's order (columns first, rounded and clipped between), because its negative weights
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

/* What is resized: of rows of `row_pixels` pixels, columns [low, high) of rows [low, high) may be
 * read; box: top, left, height, width within them. */
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

/* One dimension of a box: source pixels [low, high) may be read. In source pixels: `start` of the
 * box, `scale`, the length of an output pixel, `stretch` of the filter, `reach` on either side. */
typedef struct {
    double start, scale, stretch, reach;
    int64_t low, high, out;
    int method, is_mean; /* the mean over an area: only when shrinking */
} Axis;

static Axis axis_of(const Resize *task, int k) {
    const int64_t *ends = k ? task->columns : task->rows;
    int64_t out = k ? task->out_width : task->out_height;
    double scale = task->box[k + 2] / (double)out, stretch = scale > 1 ? scale : 1;
    double reach = task->method == BICUBIC ? 2 * stretch : stretch;
    return (Axis){task->box[k], scale,        stretch,
                  reach,        ends[0],      ends[1],
                  out,          task->method, task->method == AREA && scale > 1};
}

INLINE int64_t floor_of(double x) { return (int64_t)x - (x < (double)(int64_t)x); }

INLINE int64_t clip_index(int64_t value, int64_t low, int64_t high) {
    return value < low ? low : value > high ? high : value;
}

/* The most taps that an output position can have. */
static int64_t most_taps(const Axis *axis) {
    int64_t wide = 2 * floor_of(axis->reach) + 4;
    return wide < axis->high - axis->low ? wide : axis->high - axis->low;
}

INLINE double filter(double x, int method) {
    x = x < 0 ? -x : x;
    if (method != BICUBIC) return x < 1 ? 1 - x : 0;
    if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
    return x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0;
}

/* The pixels [begin, end) under output position x. */
INLINE void set_range(const Axis *axis, int64_t x, int64_t *begin, int64_t *end) {
    double center = axis->start + ((double)x + 0.5) * axis->scale;
    *begin = floor_of(center - axis->reach + 0.5), *end = floor_of(center + axis->reach + 0.5);
    if (axis->is_mean) { /* that it touches; beyond 1e-3 of one, as OpenCV */
        *begin = floor_of(axis->start + (double)x * axis->scale + 1e-3);
        *end = -floor_of(1e-3 - (axis->start + (double)(x + 1) * axis->scale));
    }
    *begin = clip_index(*begin, axis->low, axis->high - 1);
    *end = clip_index(*end, *begin + 1, axis->high);
}

/* Their weights, and the sum of these. */
INLINE double set_weights(const Axis *axis, int64_t x, int64_t begin, int64_t end,
                          double *weights) {
    double center = axis->start + ((double)x + 0.5) * axis->scale, inverse = 1 / axis->stretch;
    double left = axis->start + (double)x * axis->scale, total = 0;
    double right = axis->start + (double)(x + 1) * axis->scale;
    for (int64_t pixel = begin; pixel < end; pixel++) {
        double from = (double)pixel, to = from + 1;
        double shared = (to < right ? to : right) - (from > left ? from : left);
        double weight = filter((from - center + 0.5) * inverse, axis->method);
        weight = axis->is_mean ? (shared > 0 ? shared : 0) : weight;
        weights[pixel - begin] = weight, total += weight;
    }
    return total;
}

/* All positions, mirrored with `flip`, and three more that repeat the last. exact: room for the
 * weights of one. */
static void fill_taps(const Axis *axis, int flip, double *exact, Taps *taps) {
    memset(taps->weights, 0, (size_t)((axis->out + 3) * taps->stride) * sizeof(float));
    taps->most = 1;
    for (int64_t place = 0; place < axis->out + 3; place++) {
        int64_t x = place < axis->out ? place : axis->out - 1, begin, end;
        x = flip ? axis->out - 1 - x : x;
        set_range(axis, x, &begin, &end);
        double total = set_weights(axis, x, begin, end, exact);
        /* A box narrower than a pixel may leave no weight at all: read the nearest pixel. */
        double factor = total != 0 ? 1 / total : 0;
        double equal = total != 0 ? 0 : 1 / (double)(end - begin);
        float *weights = taps->weights + place * taps->stride;
        for (int64_t k = 0; k < end - begin; k++) weights[k] = (float)(exact[k] * factor + equal);
        taps->first[place] = (int32_t)begin, taps->count[place] = (int32_t)(end - begin);
        if (taps->most < end - begin) taps->most = end - begin;
    }
}

/* Counts columns from `low` on, and moves windows of `most` taps that would end behind `high`. */
static void keep_inside(const Axis *axis, Taps *taps) {
    for (int64_t x = 0; x < axis->out + 3; x++) {
        int64_t beyond = taps->first[x] + taps->most - axis->high;
        float *weights = taps->weights + x * taps->stride;
        taps->first[x] -= (int32_t)axis->low;
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

/* QUARTERS rows go through the passes together. Between the passes stand float32, for every column
 * a vector of the four channels of each row: so a tap is one load and one multiply-add. */

/* QUARTERS pixels of one row. */
INLINE void store_column(Floats pixels, float *mixed) {
#define STORE_COLUMN(q) *(Quarter *)(mixed + 4 * QUARTERS * q) = QUARTER(pixels, q);
    EACH_QUARTER(STORE_COLUMN)
}

/* A row of `columns` pixels, the weighted sum of `count` lines, into quarter 0 of `mixed`. With a
 * constant count up to FEW, addresses and weights stay in registers. */
enum { FEW = 8 };
INLINE void mix_few(const uint8_t *const *lines, const float *weights, int64_t columns,
                    float *mixed, const int count) {
    const uint8_t *line[FEW];
    Floats weight[FEW];
    for (int k = 0; k < count; k++) line[k] = lines[k], weight[k] = all(weights[k]);
    for (int64_t x = 0; x < columns; x += QUARTERS, mixed += 4 * QUARTERS * QUARTERS) {
        Floats sum = weight[0] * floats(line[0] + 4 * x);
        for (int k = 1; k < count; k++) sum = fused(weight[k], floats(line[k] + 4 * x), sum);
        store_column(sum, mixed);
    }
}

static void mix_many(const uint8_t *const *lines, const float *weights, int64_t columns,
                     float *mixed, int64_t count) {
    for (int64_t x = 0; x < columns; x += QUARTERS, mixed += 4 * QUARTERS * QUARTERS) {
        Floats sum = all(weights[0]) * floats(lines[0] + 4 * x);
        for (int64_t k = 1; k < count; k++)
            sum = fused(all(weights[k]), floats(lines[k] + 4 * x), sum);
        store_column(sum, mixed);
    }
}

/* Calls DO with the count as a constant. */
#define WITH_FEW(count, DO, MANY)                                                                  \
    switch (count) {                                                                               \
    case 1: DO(1); break;                                                                          \
    case 2: DO(2); break;                                                                          \
    case 3: DO(3); break;                                                                          \
    case 4: DO(4); break;                                                                          \
    case 5: DO(5); break;                                                                          \
    case 6: DO(6); break;                                                                          \
    case 7: DO(7); break;                                                                          \
    case 8: DO(8); break;                                                                          \
    default: MANY;                                                                                 \
    }

static void mix_rows(const uint8_t *const *lines, const float *weights, int64_t count,
                     int64_t columns, float *mixed){
#define MIX_FEW(constant) mix_few(lines, weights, columns, mixed, constant)
    WITH_FEW(count, MIX_FEW, mix_many(lines, weights, columns, mixed, count))}

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

/* QUARTERS rows of `width` pixels. As RGB, not a byte behind them is
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

static void mix_columns(const float *mixed, const Taps *taps, int64_t width, int is_rgb,
                        uint8_t *const to[QUARTERS]) {
#define MIX_BY(most) mix_by(mixed, taps, width, is_rgb, to, most)
    WITH_FEW(taps->most, MIX_BY, MIX_BY(taps->most))
}

/* ==== Rows ==================================================================================== */

typedef struct {
    const Resize *task;
    Rows *rows;
    Taps down, across, unit;       /* unit: one tap per column, itself */
    const uint8_t **lines, **used; /* rows in a ring, and those of one output row */
    int64_t ring, ready;           /* its length; rows before `ready` are or were in it */
    uint8_t *rooms, *spare;        /* of the ring, then QUARTERS; a row that nobody reads */
    int64_t room_bytes;
    double *exact;
    float *mixed, *source; /* between the passes: of output rows; of bicubic's source rows */
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
    take_taps(&at, &work->down, task->out_height, most_taps(&down));
    take_taps(&at, &work->across, task->out_width, most_taps(&across));
    if (task->method == BICUBIC) take_taps(&at, &work->unit, task->out_width, 1);
    work->ring = work->down.stride + QUARTERS;
    work->lines = take_bytes(&at, 8 * work->ring);
    work->exact = take_bytes(&at, 8 * (work->down.stride + work->across.stride));
    work->used = take_bytes(&at, 8 * work->ring);
    work->rooms = take_bytes(&at, (work->ring + QUARTERS) * work->room_bytes);
    work->spare = take_bytes(&at, work->room_bytes);
    int64_t mixed = task->method == BICUBIC ? task->out_width : width;
    work->mixed = take_bytes(&at, 16 * QUARTERS * (mixed + QUARTERS));
    if (task->method == BICUBIC) work->source = take_bytes(&at, 16 * QUARTERS * (width + QUARTERS));
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
    mix_columns(work->source, &work->across, work->task->out_width, 0, to);
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
    fill_taps(&down, 0, work.exact, &work.down);
    fill_taps(&across, task->flip, work.exact, &work.across);
    keep_inside(&across, &work.across);
    if (task->method == BICUBIC) set_unit(&work.unit, task->out_width);
    work.ready = work.down.first[0];
    int is_bicubic = task->method == BICUBIC;
    const Taps *taps = is_bicubic ? &work.unit : &work.across;
    int64_t columns = is_bicubic ? task->out_width : across.high - across.low;
    for (int64_t y = 0; y < task->out_height; y += QUARTERS) {
        uint8_t *to[QUARTERS];
        for (int q = 0; q < QUARTERS; q++) {
            int64_t row = y + q < task->out_height ? y + q : task->out_height - 1;
            mix_output_row(&work, row, columns, work.mixed + 4 * q);
            to[q] = y + q == row ? out + 3 * row * task->out_width : work.spare;
        }
        mix_columns(work.mixed, taps, task->out_width, 1, to);
    }
}
