/* An image that must shrink: to samples, to the mean over the area of each new one, to levels.
 *
 * Y, Cb and Cr each by themselves: chroma is never brought to full size, and nothing becomes RGB.
 * Included by recode.c.
 */

typedef struct {
    int from_width, from_height, width, height; /* samples */
    double ratio[2];                            /* old samples across and down for one new */
    int taps, *starts;                          /* new column: mean of `taps` old ones from there */
    float *weights, *strips, *across, *rows, *sum;
    int strip;        /* floats of eight rows of old samples, column by column */
    int seen, made;   /* old rows taken, new rows finished */
    uint8_t *samples; /* new ones, whole MCUs */
    int64_t stride;
} Plane;

/* Weight of old sample `place` in the new one, which reaches from a to b. */
static float weight_of(double a, double b, int place) {
    double low = a > place ? a : place, high = b < place + 1 ? b : place + 1;
    return high > low ? (float)((high - low) / (b - a)) : 0;
}

/* Where new sample `place` lies, kept inside `size` old ones; where rounding leaves nothing of it,
 * the last one. */
static void reach(int place, double ratio, int size, double *a, double *b) {
    *a = place * ratio, *b = *a + ratio;
    if (*b > size) *b = size;
    if (*a > *b - 1e-6) *a = *b - 1 < 0 ? 0 : *b - 1;
}

static void lay_out(Job *job, Plane *plane, int c) {
    const Header *header = job->header;
    int part = c ? 2 : 1, old = c && header->halved ? 2 : 1, side = 16 / part;
    double a, b;
    plane->from_width = (header->width + old - 1) / old;
    plane->from_height = (header->height + old - 1) / old;
    plane->width = (job->width + part - 1) / part, plane->height = (job->height + part - 1) / part;
    plane->ratio[0] = (double)header->width / job->width * part / old;
    plane->ratio[1] = (double)header->height / job->height * part / old;
    plane->taps = (int)plane->ratio[0] + 2;
    plane->strip = (header->width / old + 16 + plane->taps + 16) * 8;
    plane->strips = take(job, (c ? 1 : 2) * sizeof(float) * plane->strip);
    plane->stride = job->columns * side;
    plane->samples = take(job, plane->stride * job->rows * side);
    plane->across = take(job, sizeof(float) * 8 * plane->stride);
    plane->rows = take(job, sizeof(float) * 8 * plane->stride);
    plane->sum = take(job, sizeof(float) * plane->stride);
    plane->starts = take(job, sizeof(int) * plane->width);
    plane->weights = take(job, sizeof(float) * plane->taps * plane->width);
    for (int x = 0; x < plane->width; x++) {
        reach(x, plane->ratio[0], plane->from_width, &a, &b);
        plane->starts[x] = (int)a;
        for (int i = 0; i < plane->taps; i++)
            plane->weights[plane->taps * x + i] = weight_of(a, b, (int)a + i);
    }
}

INLINE void mean_across(const Plane *plane, const float *strip, int taps) {
    for (int x = 0; x < plane->width; x++) {
        const V *in = (const V *)(strip + 8 * plane->starts[x]);
        const float *weights = plane->weights + taps * x;
        V sum = weights[0] * in[0];
        for (int i = 1; i < taps; i++) sum += weights[i] * in[i];
        *(V *)(plane->across + 8 * x) = sum;
    }
}

APART void add_row(float *restrict sum, const float *restrict row, float weight, int width) {
    for (int x = 0; x < width; x++) sum[x] += weight * row[x];
}

APART void finish_row(float *restrict sum, uint8_t *restrict to, int width, int64_t stride) {
    for (int x = 0; x < width; x++) {
        to[x] = (uint8_t)(int)(sum[x] + 0.5f); /* the weights' sum is 1 but for rounding */
        sum[x] = 0;
    }
    memset(to + width, to[width - 1], stride - width);
}

/* One more old row, already as wide as a new one: it lies in one new row or in two. */
static void mean_down(Plane *plane, const float *row) {
    int place = plane->seen++;
    double a, b;
    if (place >= plane->from_height) return;
    while (plane->made < plane->height) {
        reach(plane->made, plane->ratio[1], plane->from_height, &a, &b);
        float weight = weight_of(a, b, place);
        if (weight > 0) add_row(plane->sum, row, weight, plane->width);
        if (b > place + 1) break;
        uint8_t *to = plane->samples + plane->stride * plane->made++;
        finish_row(plane->sum, to, plane->width, plane->stride);
    }
}

/* Take eight old rows. */
static void shrink_strip(Plane *plane, const float *strip) {
    if (plane->taps == 3) /* nearly always; the same sums */
        mean_across(plane, strip, 3);
    else mean_across(plane, strip, plane->taps);
    for (int x = 0; x < plane->width; x += 8) {
        V v[8];
        memcpy(v, plane->across + 8 * x, sizeof v);
        transpose(v);
        for (int i = 0; i < 8; i++) memcpy(plane->rows + plane->stride * i + x, v + i, sizeof *v);
    }
    for (int i = 0; i < 8; i++) mean_down(plane, plane->rows + plane->stride * i);
}

/* Read all samples, MCU after MCU. */
static int shrink_all(Job *job, Plane *planes) {
    const Header *header = job->header;
    float steps[3][64];
    int side = header->halved ? 2 : 1, luma = side * side;
    int columns = (header->width + 8 * side - 1) / (8 * side);
    int rows = (header->height + 8 * side - 1) / (8 * side);
    for (int i = 0; i < 192; i++) {
        int place = ZIGZAG[i % 64];
        steps[i / 64][place] = header->steps[i / 64][i % 64] * AAN[place >> 3] * AAN[place & 7] / 8;
    }
    for (int y = 0; y < rows; y++) {
        for (int x = 0; x < columns; x++) {
            for (int b = 0; b < luma + 2; b++) {
                Placed values;
                int c = b < luma ? 0 : b - luma + 1, down = c ? 0 : b / side;
                int64_t column = c ? x : side * x + b % side;
                if (!read_rows(job, c, values)) return 0;
                float *strip = planes[c].strips + down * planes[c].strip;
                samples_of(values, steps[c], strip + 64 * column);
            }
        }
        for (int c = 0; c < 3; c++) {
            shrink_strip(&planes[c], planes[c].strips);
            if (c == 0 && side == 2) shrink_strip(&planes[c], planes[c].strips + planes[c].strip);
        }
    }
    return 1;
}

static int shrink(Job *job) {
    Plane planes[3] = {0};
    float scales[2][64];
    Block blocks[6];
    for (int c = 0; c < 3; c++) lay_out(job, &planes[c], c);
    if (!shrink_all(job, planes)) return 0;
    for (int c = 0; c < 3; c++)
        for (int y = planes[c].height; y < job->rows * (c ? 8 : 16); y++) {
            uint8_t *to = planes[c].samples + planes[c].stride * y;
            memcpy(to, to - planes[c].stride, planes[c].stride);
        }
    for (int i = 0; i < 128; i++) {
        int u = ZIGZAG[i % 64] & 7, v = ZIGZAG[i % 64] >> 3;
        scales[i / 64][8 * u + v] = 1 / (job->steps[i / 64][i % 64] * AAN[u] * AAN[v] * 8);
    }
    for (int64_t i = 0; i < (int64_t)job->columns * job->rows; i++) {
        int64_t x = i % job->columns, y = i / job->columns;
        for (int b = 0; b < 6; b++) {
            const Plane *plane = planes + (b < 4 ? 0 : b - 3);
            int64_t down = b < 4 ? 16 * y + 8 * (b >> 1) : 8 * y;
            int64_t across = b < 4 ? 16 * x + 8 * (b & 1) : 8 * x;
            block_of(plane->samples + plane->stride * down + across, plane->stride, scales[b > 3],
                     blocks + b);
        }
        write_mcu(job, blocks);
    }
    return 1;
}
