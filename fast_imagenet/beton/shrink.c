/* A JPEG decoded, shrunk and encoded in one go, on the planes Y, Cb, Cr, by libjpeg-turbo.
 *
 * The way of decode.py and encode.py without the detours: chroma is never brought to full size,
 * nothing becomes RGB, and the shrinking is separable. A source of four times the size or more is
 * decoded at half of it (or a quarter, an eighth), which leaves at least a halving to the mean.
 * Any error or warning of the library ends in -1.
 */
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <jpeglib.h>

enum { BLOCKS = 32, MARGIN = 64 };

/* The same fields as `ShrinkJob` in jpeg_native.py. */
typedef struct {
    int64_t width, height, interval, size, room; /* of the new picture; bytes of data, of out */
    const uint8_t *data;
    const uint16_t *steps; /* [2][64], file order */
    const int32_t *zigzag;
    uint8_t *out;
} Job;

typedef struct {
    uint8_t *pixels;
    int width, height, stride, rows;
} Plane;

typedef struct {
    struct jpeg_error_mgr errors; /* first: the library hands back its address */
    jmp_buf escape;
    struct jpeg_decompress_struct in;
    struct jpeg_compress_struct out;
    Plane from[3], to[3];
    double ratio[3][2]; /* old pixels across and down for one new */
    void *blocks[BLOCKS];
    int used;
    unsigned char *made;
    unsigned long made_size;
} Work;

static void leave(j_common_ptr info) { longjmp(((Work *)info->err)->escape, 1); }

static void warn(j_common_ptr info, int level) {
    if (level < 0) leave(info); /* damaged data, which the library would make something up for */
}

static void *room(Work *work, size_t size) {
    void *block = work->used < BLOCKS ? calloc(size, 1) : NULL;
    if (!block) longjmp(work->escape, 1);
    return work->blocks[work->used++] = block;
}

/* Share of old pixel `place` in the new one that reaches from a to b. */
static float share(double a, double b, int place) {
    double low = a > place ? a : place, high = b < place + 1 ? b : place + 1;
    return high > low ? (float)((high - low) / (b - a)) : 0;
}

/* Where new pixel `place` lies, kept inside `size` old ones. */
static void reach(int place, double ratio, int size, double *a, double *b) {
    *a = place * ratio, *b = *a + ratio;
    if (*b > size) *b = size;
    if (*a > *b - 1e-6) *a = *b - 1 < 0 ? 0 : *b - 1;
}

static void add_rows(const Plane *from, double a, double b, float *restrict sum) {
    for (int y = (int)a; y < b && y < from->height; y++) {
        const uint8_t *restrict in = from->pixels + (size_t)y * from->stride;
        float weight = share(a, b, y);
        if (y == (int)a)
            for (int x = 0; x < from->width; x++) sum[x] = weight * in[x];
        else
            for (int x = 0; x < from->width; x++) sum[x] += weight * in[x];
    }
}

static inline __attribute__((always_inline)) void add_columns(const float *restrict sum,
    const int *restrict starts, const float *restrict weights, int taps, int width,
    uint8_t *restrict out) {
    for (int x = 0; x < width; x++) {
        const float *in = sum + starts[x], *weight = weights + taps * x;
        float value = 0.5f;
        for (int i = 0; i < taps; i++) value += weight[i] * in[i];
        out[x] = (uint8_t)(int)value; /* the weights' sum is 1 but for rounding: at most 255.6 */
    }
}

/* Mean over the area of each new pixel; the last row and column are repeated to the stride. */
static void shrink_plane(Work *work, const Plane *from, const Plane *to, const double *ratio) {
    int taps = (int)ratio[0] + 2;
    int *starts = room(work, sizeof(int) * to->width);
    float *weights = room(work, sizeof(float) * taps * to->width);
    float *sum = room(work, sizeof(float) * (from->width + taps + 1));
    double a, b;
    for (int x = 0; x < to->width; x++) {
        reach(x, ratio[0], from->width, &a, &b);
        starts[x] = (int)a;
        for (int i = 0; i < taps; i++) weights[taps * x + i] = share(a, b, starts[x] + i);
    }
    for (int y = 0; y < to->rows; y++) {
        uint8_t *out = to->pixels + (size_t)y * to->stride;
        if (y >= to->height) {
            memcpy(out, out - to->stride, to->stride);
            continue;
        }
        reach(y, ratio[1], from->height, &a, &b);
        add_rows(from, a, b, sum);
        if (taps == 3)  /* nearly always; the same sums */
            add_columns(sum, starts, weights, 3, to->width, out);
        else
            add_columns(sum, starts, weights, taps, to->width, out);
        memset(out + to->width, out[to->width - 1], to->stride - to->width);
    }
}

/* The old planes' places and sizes; `lines`: rows of each that the library gives at a time. */
static void lay_out(Work *work, const Job *job, int *lines) {
    struct jpeg_decompress_struct *in = &work->in;
    for (int c = 0; c < 3; c++) {
        jpeg_component_info *info = &in->comp_info[c];
        Plane *plane = &work->from[c];
        double across = info->h_samp_factor * info->DCT_scaled_size;
        double down = info->v_samp_factor * info->DCT_scaled_size;
        across /= in->max_h_samp_factor * in->min_DCT_scaled_size;
        down /= in->max_v_samp_factor * in->min_DCT_scaled_size;
        lines[c] = info->v_samp_factor * info->DCT_scaled_size;
        plane->width = info->downsampled_width, plane->height = info->downsampled_height;
        plane->stride = info->width_in_blocks * info->DCT_scaled_size + MARGIN;
        plane->rows = in->total_iMCU_rows * lines[c];
        plane->pixels = room(work, (size_t)plane->stride * plane->rows);
        work->ratio[c][0] = (c ? 2 : 1) * across * in->output_width / job->width;
        work->ratio[c][1] = (c ? 2 : 1) * down * in->output_height / job->height;
    }
}

static void decode(Work *work, const Job *job) {
    struct jpeg_decompress_struct *in = &work->in;
    JSAMPROW rows[3][2 * DCTSIZE * MAX_SAMP_FACTOR];
    JSAMPARRAY planes[3] = {rows[0], rows[1], rows[2]};
    int lines[3], scale = 1;
    jpeg_mem_src(in, job->data, job->size);
    jpeg_read_header(in, TRUE);
    if (in->num_components != 3 || in->jpeg_color_space != JCS_YCbCr) leave((j_common_ptr)in);
    in->raw_data_out = TRUE, in->out_color_space = JCS_YCbCr;
    while (scale < 8 && in->image_width >= 4 * scale * job->width &&
           in->image_height >= 4 * scale * job->height)
        scale *= 2;
    in->scale_num = 1, in->scale_denom = scale;
    jpeg_start_decompress(in);
    lay_out(work, job, lines);
    for (int v = 0; in->output_scanline < in->output_height; v++) {
        for (int c = 0; c < 3; c++)
            for (int i = 0; i < lines[c]; i++)
                rows[c][i] = work->from[c].pixels +
                             (size_t)(v * lines[c] + i) * work->from[c].stride;
        jpeg_read_raw_data(in, planes, in->max_v_samp_factor * in->min_DCT_scaled_size);
    }
    jpeg_finish_decompress(in);
}

static void encode(Work *work, const Job *job) {
    struct jpeg_compress_struct *out = &work->out;
    JSAMPROW rows[3][2 * DCTSIZE];
    JSAMPARRAY planes[3] = {rows[0], rows[1], rows[2]};
    work->made = job->out, work->made_size = job->room; /* when it does not fit, another is made */
    jpeg_mem_dest(out, &work->made, &work->made_size);
    out->image_width = job->width, out->image_height = job->height;
    out->input_components = 3, out->in_color_space = JCS_YCbCr;
    jpeg_set_defaults(out);
    for (int t = 0; t < 2; t++) {
        unsigned int table[64];
        for (int k = 0; k < 64; k++) table[job->zigzag[k]] = job->steps[64 * t + k];
        jpeg_add_quant_table(out, t, table, 100, TRUE);
    }
    out->raw_data_in = TRUE, out->restart_interval = job->interval;
    jpeg_start_compress(out, TRUE);
    while (out->next_scanline < out->image_height) {
        for (int c = 0; c < 3; c++)
            for (int i = 0; i < (c ? 8 : 16); i++)
                rows[c][i] = work->to[c].pixels +
                             (size_t)(out->next_scanline / (c ? 2 : 1) + i) * work->to[c].stride;
        jpeg_write_raw_data(out, planes, 16);
    }
    jpeg_finish_compress(out);
}

static int64_t shrink(Work *work, const Job *job) {
    if (setjmp(work->escape)) return -1;
    jpeg_create_decompress(&work->in);
    jpeg_create_compress(&work->out);
    decode(work, job);
    for (int c = 0; c < 3; c++) {
        Plane *to = &work->to[c];
        int part = c ? 2 : 1;
        to->width = (job->width + part - 1) / part, to->height = (job->height + part - 1) / part;
        to->stride = (job->width + 15) / 16 * (16 / part);
        to->rows = (job->height + 15) / 16 * (16 / part);
        to->pixels = room(work, (size_t)to->stride * to->rows);
        shrink_plane(work, &work->from[c], to, work->ratio[c]);
    }
    encode(work, job);
    if (work->made == job->out) return work->made_size;
    free(work->made);
    return -1;
}

/* Bytes written to job->out, or -1. */
int64_t shrink_jpeg(const Job *job) {
    Work *work = calloc(1, sizeof *work);
    if (!work) return -1;
    work->in.err = work->out.err = jpeg_std_error(&work->errors);
    work->errors.error_exit = leave, work->errors.emit_message = warn;
    int64_t result = shrink(work, job);
    jpeg_destroy_decompress(&work->in);
    jpeg_destroy_compress(&work->out);
    for (int i = 0; i < work->used; i++) free(work->blocks[i]);
    free(work);
    return result;
}
