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
typedef struct Rows {
    const uint8_t *(*get)(struct Rows *, int64_t y, uint8_t *room);
} Rows;

/* What is resized: of rows of `row_pixels` pixels a box: top, left, height, width. Pixels that it
 * covers in part may be read. out: height, width. */
typedef struct {
    int64_t row_pixels;
    double box[4];
    int64_t out[2];
    int flip, method;
} Resize;

/* One dimension of a box: source pixels [low, high) may be read. In source pixels: `start` of the
 * box, `scale`, the length of an output pixel, `stretch` of the filter, `reach` on either side. */
typedef struct {
    double start, scale, stretch, reach;
    int64_t low, high, out;
    int method, is_mean; /* the mean over an area: only when shrinking */
} Axis;

/* Where every output position reads, and with which weights: spans[x].first + k times
 * weights[x * stride + k], for k below spans[x].count; up to `most` the weights are zero. */
typedef struct {
    struct {
        int32_t first, count;
    } *spans;
    float *weights, half; /* half: what is added before the fraction is cut off */
    int64_t stride, most;
} Taps;

INLINE int64_t floor_of(double x) { return (int64_t)x - (x < (double)(int64_t)x); }

static Axis axis_of(const Resize *task, int k) {
    double start = task->box[k], length = task->box[k + 2], scale = length / (double)task->out[k];
    double stretch = scale > 1 ? scale : 1;
    double reach = task->method == BICUBIC ? 2 * stretch : stretch;
    int64_t low = floor_of(start), high = -floor_of(-(start + length));
    int is_mean = task->method == AREA && scale > 1;
    return (Axis){start, scale, stretch, reach, low, high, task->out[k], task->method, is_mean};
}

/* The most taps that an output position can have. */
static int64_t most_taps(const Axis *axis) {
    return least(2 * floor_of(axis->reach) + 4, axis->high - axis->low);
}

INLINE double filter(double x, int method) {
    x = x < 0 ? -x : x;
    if (method != BICUBIC) return x < 1 ? 1 - x : 0;
    if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
    return x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0;
}

/* The pixels from *first on that output position x reads, and their weights; the sum of these is 1.
 * Returns their number. */
static int64_t weigh_pixels(const Axis *axis, int64_t x, int32_t *first, double *weights) {
    double center = axis->start + ((double)x + 0.5) * axis->scale, total = 0;
    double left = axis->start + (double)x * axis->scale, inverse = 1 / axis->stretch;
    double right = axis->start + (double)(x + 1) * axis->scale;
    int64_t begin = floor_of(center - axis->reach + 0.5);
    int64_t end = floor_of(center + axis->reach + 0.5);
    if (axis->is_mean) /* that it touches; beyond 1e-3 of one, as OpenCV */
        begin = floor_of(left + 1e-3), end = -floor_of(1e-3 - right);
    begin = most(axis->low, least(begin, axis->high - 1));
    end = most(begin + 1, least(end, axis->high));
    for (int64_t pixel = begin; pixel < end; pixel++) {
        double from = (double)pixel, to = from + 1;
        double shared = (to < right ? to : right) - (from > left ? from : left);
        double weight = filter((from - center + 0.5) * inverse, axis->method);
        weight = axis->is_mean ? (shared > 0 ? shared : 0) : weight;
        weights[pixel - begin] = weight, total += weight;
    }
    /* A box narrower than a pixel may leave no weight at all: read the nearest pixel. */
    double factor = total != 0 ? 1 / total : 0, equal = total != 0 ? 0 : 1 / (double)(end - begin);
    for (int64_t k = 0; k < end - begin; k++) weights[k] = weights[k] * factor + equal;
    *first = (int32_t)begin;
    return end - begin;
}

/* All positions, mirrored with `flip`, and three more without weight. exact: room for the weights
 * of one. */
static void fill_taps(const Axis *axis, int flip, double *exact, Taps *taps) {
    memset(taps->weights, 0, (size_t)((axis->out + 3) * taps->stride) * sizeof(float));
    memset(taps->spans + axis->out, 0, 3 * sizeof *taps->spans);
    /* Of bicubic an exact half, frequent in ramps, is rounded up whatever the sum's last bits are.
     */
    taps->most = 1, taps->half = axis->method == BICUBIC ? 0.5f + 1.0f / 65536 : 0.5f;
    for (int64_t place = 0; place < axis->out; place++) {
        int64_t x = flip ? axis->out - 1 - place : place;
        int64_t count = weigh_pixels(axis, x, &taps->spans[place].first, exact);
        taps->spans[place].count = (int32_t)count;
        float *weights = taps->weights + place * taps->stride;
        for (int64_t k = 0; k < count; k++) weights[k] = (float)exact[k];
        if (taps->most < count) taps->most = count;
    }
}

/* QUARTERS rows go through the passes together. Between the passes stand float32, for every column
 * a vector of the four channels of each row: so a tap is one load and one multiply-add. */

/* A row of `columns` pixels, the weighted sum of `count` lines, into quarter 0 of `mixed`. With a
 * constant count up to FEW, addresses and weights stay in registers. */
enum { FEW = 8 };
INLINE void mix_lines(const uint8_t *const *lines, const float *weights, int64_t columns,
                      float *mixed, const int64_t count) {
    const uint8_t *line[FEW] = {lines[0]};
    Floats weight[FEW] = {all(weights[0])};
    for (int k = 1; k < FEW && k < count; k++) line[k] = lines[k], weight[k] = all(weights[k]);
    for (int64_t x = 0; x < columns; x += QUARTERS, mixed += 4 * QUARTERS * QUARTERS) {
        Floats sum = weight[0] * floats(line[0] + 4 * x);
        for (int64_t k = 1; k < count; k++)
            sum = k < FEW ? fused(weight[k], floats(line[k] + 4 * x), sum)
                          : fused(all(weights[k]), floats(lines[k] + 4 * x), sum);
#define STORE_COLUMN(q) *(Quarter *)(mixed + 4 * QUARTERS * q) = QUARTER(sum, q);
        EACH_QUARTER(STORE_COLUMN)
    }
}

/* Calls DO with the count as a constant. */
#define WITH_FEW(count, DO)                                                                        \
    switch (count) {                                                                               \
    case 1: DO(1); break;                                                                          \
    case 2: DO(2); break;                                                                          \
    case 3: DO(3); break;                                                                          \
    case 4: DO(4); break;                                                                          \
    case 5: DO(5); break;                                                                          \
    case 6: DO(6); break;                                                                          \
    case 7: DO(7); break;                                                                          \
    case 8: DO(8); break;                                                                          \
    default: DO(count);                                                                            \
    }

static void mix_rows(const uint8_t *const *lines, const float *weights, int64_t count,
                     int64_t columns, float *mixed){
#define MIX_LINES(count) mix_lines(lines, weights, columns, mixed, count)
    WITH_FEW(count, MIX_LINES)}

/* Four pixels of every row from `most` columns each, rounded and clipped: RGBX. */
INLINE Int16s mix_four(const float *mixed, const Taps *taps, int64_t x, const int64_t most) {
    Int32s levels[4];
    for (int i = 0; i < 4; i++) {
        const float *columns = mixed + 4 * QUARTERS * (int64_t)taps->spans[x + i].first;
        const float *weights = taps->weights + (x + i) * taps->stride;
        Floats sum = all(taps->half);
        for (int64_t k = 0; k < most; k++)
            sum = fused(all(weights[k]), *(const Floats *)(columns + 4 * QUARTERS * k), sum);
        levels[i] = __builtin_convertvector(sum, Int32s);
    }
    return narrow16_unsigned(narrow32(levels[0], levels[1]), narrow32(levels[2], levels[3]));
}

/* QUARTERS rows of `width` pixels. As RGB, not a byte behind them is written; as RGBX, up to the
 * next multiple of four pixels. */
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
    WITH_FEW(taps->most, MIX_BY)
}

typedef struct {
    const Resize *task;
    Rows *rows;
    Axis axes[2];            /* of rows, of columns */
    Taps down, across, unit; /* unit: one tap per column, itself */
    const uint8_t **lines;   /* rows in a ring, twice: those of an output row stand side by side */
    int64_t ring, ready;     /* its length; rows before `ready` are or were in it */
    uint8_t *rooms, *spare;  /* of the ring, then QUARTERS; a row that nobody reads */
    int64_t room_bytes, width;
    double *exact;
    float *mixed, *source; /* between the passes: of output rows; of bicubic's source rows */
} Work;

/* Lay out the work in a room. Returns 0: there is no memory. */
static int lay_out_work(Work *work, const Resize *task, Room *room) {
    *work = (Work){.task = task, .axes = {axis_of(task, 0), axis_of(task, 1)}};
    int64_t tall = task->out[0] + 3, wide = task->out[1] + 3;
    int64_t width = work->axes[1].high - work->axes[1].low, taps = most_taps(&work->axes[1]);
    int64_t columns = 16 * QUARTERS * (taps + QUARTERS);
    work->room_bytes = (4 * (most(task->row_pixels, wide) + VECTOR) + 63) / 64 * 64;
    work->down.stride = most_taps(work->axes), work->across.stride = taps, work->unit.stride = 1;
    work->ring = work->down.stride + QUARTERS, work->width = width;
    return PLACE(room, {&work->down.spans, tall * sizeof *work->down.spans},
                 {&work->down.weights, 4 * tall * work->down.stride},
                 {&work->across.spans, wide * sizeof *work->across.spans},
                 {&work->across.weights, 4 * wide * taps},
                 {&work->unit.spans, wide * sizeof *work->unit.spans},
                 {&work->unit.weights, 4 * wide}, {&work->lines, 16 * work->ring},
                 {&work->exact, 8 * (work->down.stride + taps)},
                 {&work->rooms, (work->ring + QUARTERS) * work->room_bytes},
                 {&work->spare, work->room_bytes},
                 {&work->mixed, columns + 16 * QUARTERS * most(width, wide)},
                 {&work->source, columns + 16 * QUARTERS * width});
}

static void keep_line(Work *work, const uint8_t *line) {
    int64_t slot = work->ready++ % work->ring;
    work->lines[slot] = work->lines[slot + work->ring] = line;
}

/* The next row into the ring, as it comes. */
static void fetch_row(Work *work) {
    uint8_t *room = work->rooms + work->ready % work->ring * work->room_bytes;
    keep_line(work, work->rows->get(work->rows, work->ready, room) + 4 * work->axes[1].low);
}

/* The next QUARTERS rows into the ring, their columns resized. */
static void fetch_resized(Work *work) {
    const float one = 1;
    uint8_t *to[QUARTERS];
    for (int q = 0; q < QUARTERS; q++) {
        uint8_t *room = work->rooms + (work->ring + q) * work->room_bytes;
        const uint8_t *row = room;
        if (work->ready < work->axes[0].high)
            row = work->rows->get(work->rows, work->ready, room) + 4 * work->axes[1].low;
        mix_rows(&row, &one, 1, work->width, work->source + 4 * q);
        to[q] = work->rooms + work->ready % work->ring * work->room_bytes;
        keep_line(work, to[q]);
    }
    mix_columns(work->source, &work->across, work->task->out[1], 0, to);
}

/* The weighted sum of the rows under output row y into its quarter of `mixed`. */
static void mix_output_row(Work *work, int64_t y, int64_t columns, float *mixed) {
    int64_t first = work->down.spans[y].first, count = work->down.spans[y].count;
    while (work->ready < first + count)
        work->task->method == BICUBIC ? fetch_resized(work) : fetch_row(work);
    mix_rows(work->lines + first % work->ring, work->down.weights + y * work->down.stride, count,
             columns, mixed);
}

/* out: out[0] * out[1] pixels of three bytes, contiguous. Nothing is checked here. Returns 0: there
 * is no memory. */
static int resize(const Resize *task, Rows *rows, uint8_t *out, Room *room) {
    Work work;
    if (!lay_out_work(&work, task, room)) return 0;
    work.rows = rows;
    int64_t height = task->out[0], width = task->out[1], is_bicubic = task->method == BICUBIC;
    int64_t columns = is_bicubic ? width : work.width;
    Axis unit = {
        .scale = 1, .stretch = 1, .high = width, .out = width, .is_mean = 1, .method = BICUBIC};
    fill_taps(work.axes, 0, work.exact, &work.down);
    fill_taps(work.axes + 1, task->flip, work.exact, &work.across);
    if (is_bicubic) fill_taps(&unit, 0, work.exact, &work.unit);
    for (int64_t x = 0; x < width; x++) work.across.spans[x].first -= (int32_t)work.axes[1].low;
    float *ends[] = {work.mixed + 4 * QUARTERS * columns, work.source + 4 * QUARTERS * work.width};
    for (int i = 0; i < 2; i++) /* behind the last column, where weights are zero: finite */
        memset(ends[i], 0, 16 * QUARTERS * (work.across.stride + QUARTERS));
    work.ready = work.down.spans[0].first;
    for (int64_t y = 0; y < height; y += QUARTERS) {
        uint8_t *to[QUARTERS];
        for (int q = 0; q < QUARTERS; q++) {
            int64_t row = y + q < height ? y + q : height - 1;
            mix_output_row(&work, row, columns, work.mixed + 4 * q);
            to[q] = y + q == row ? out + 3 * row * width : work.spare;
        }
        mix_columns(work.mixed, is_bicubic ? &work.unit : &work.across, width, 1, to);
    }
    return 1;
}
