/* A plain JPEG written anew without the detour over RGB pixels: recode.py says what for.
 *
 * One pass, a row of MCUs (16 x 16 px) at a time: coefficients are read, rounded to coarser steps
 * and written in a fixed Huffman code; chroma at full size is halved on the way. An image that must
 * shrink goes through samples of Y, Cb and Cr (shrink.h). A level is a coefficient as it is
 * written, in units of its step (quantiser).
 *
 * Memory comes from the caller, nothing is allocated. Little-endian machines only.
 */
#include "blocks.h"

enum {
    HEAD_BYTES = 1024, /* of what is written before the scan, at most */
    /* of an MCU that is written: at most 27 bits per level, every byte stuffed; then a marker */
    MCU_BYTES = 6 * 64 * 27 / 8 * 2 + 16,
    /* that a damaged block may read behind the end: less than 32 bits per level, and whole words */
    BLOCK_SLACK = 64 * 4 + 128
};

/* What stays from one image to the next. */
static _Thread_local struct {
    Table tables[6];
    Codes codes[2]; /* luma, chroma */
} kept;

/* One image's conversion. */
typedef struct {
    const Header *header;
    Reader in;
    const uint8_t *end; /* of what may be read */
    Writer out;
    uint8_t *arena;              /* memory that is left */
    int width, height, interval; /* of the new image */
    int columns, rows;           /* MCUs of the new image */
    uint8_t steps[2][64];        /* of the new image, file order */
    const Table *tables[6];      /* DC, AC of each component */
    int previous[3], written[3]; /* first levels of the block before, by component */
    int64_t mcu;                 /* written so far */
} Job;

static void *take(Job *job, int64_t bytes) {
    uint8_t *place = job->arena;
    job->arena += (bytes + 63) & ~63ll;
    return memset(place, 0, bytes);
}

/* Six blocks, and a marker where one is due. */
static void write_mcu(Job *job, const Block *blocks) {
    for (int b = 0; b < 6; b++)
        put_block(&job->out, blocks + b, &job->written[b < 4 ? 0 : b - 3], &kept.codes[b > 3]);
    int64_t number = job->mcu++ / job->interval;
    int is_last = job->mcu == (int64_t)job->columns * job->rows;
    if (job->mcu % job->interval && !is_last) return;
    put_marker(&job->out, is_last ? 0xD9 : 0xD0 + (number & 7));
    memset(job->written, 0, sizeof job->written);
}

static uint8_t *put_segment(uint8_t *at, int marker, const void *body, int size) {
    *at++ = 0xFF, *at++ = marker, *at++ = (size + 2) >> 8, *at++ = (size + 2) & 255;
    memcpy(at, body, size);
    return at + size;
}

/* Everything before the scan. */
static void write_head(Job *job) {
    uint8_t *at = job->out.at, body[130];
    memcpy(at, "\xff\xd8", 2);
    at = put_segment(at + 2, 0xE0, "JFIF\0\1\1\0\0\1\0\1\0", 14);
    for (int t = 0; t < 2; t++) {
        body[65 * t] = t;
        memcpy(body + 65 * t + 1, job->steps[t], 64);
    }
    at = put_segment(at, 0xDB, body, 130);
    /* clang-format off */
    uint8_t frame[] = {8, job->height >> 8, job->height, job->width >> 8, job->width,
                       3, 1, 0x22, 0, 2, 0x11, 1, 3, 0x11, 1};
    /* clang-format on */
    at = put_segment(at, 0xC0, frame, sizeof frame);
    at = put_segment(at, 0xC4, CODE_TABLES, sizeof CODE_TABLES);
    uint8_t interval[] = {job->interval >> 8, job->interval};
    at = put_segment(at, 0xDD, interval, 2);
    job->out.at = put_segment(at, 0xDA, "\3\1\0\2\x11\3\x11\0\x3f", 10);
    job->out.bits = 0, job->out.free = 64;
}

typedef int16_t Plain[ROOM], Placed[72]; /* coefficients in the order of the file, or row by row */

INLINE int read_block(Job *job, int c, const uint8_t *order, int16_t *values) {
    const Table *first = job->tables[2 * c], *others = job->tables[2 * c + 1];
    Reader in = job->in;
    uint32_t k = 0, entry;
    memset(values, 0, 64 * sizeof *values);
    refill(&in);
    if (!read_first(&in, first, &job->previous[c]) || abs(job->previous[c]) > 2047) return 0;
    refill(&in);
    do { /* four entries of the look-up table use 48 bits at most */
        for (int i = 0; i < 4; i++) {
            entry = step(&in, others->look, order, values, &k);
            if (k > 62) break;
        }
        if (k <= 62) refill(&in);
        else if (!finish_step(&in, others, order, values, &k, entry)) return 0;
    } while (k < 63);
    values[0] = job->previous[c];
    job->in = in;
    return in.at <= job->end;
}

APART int read_plain(Job *job, int c, Plain values) { return read_block(job, c, NULL, values); }
APART int read_rows(Job *job, int c, Placed values) { return read_block(job, c, ZIGZAG, values); }

/* A block that keeps its size. Called some blocks after its values were written: loads wider than
 * the stores just before them make the processor wait. */
INLINE void keep_block(const Plain values, const float *scales, Block *block) {
    round_whole(values, scales, block->levels);
    set_mask(block);
}

static void set_scales(float *scales, const uint8_t *old, const uint8_t *new) {
    for (int k = 0; k < 64; k++) scales[k] = (float)old[k] / (float)new[k];
}

/* Returns, as all that read: 0: the source is damaged. */
static int keep_halved(Job *job) {
    float scales[2][64];
    Plain values[6];
    Block blocks[6];
    for (int t = 0; t < 2; t++) set_scales(scales[t], job->header->steps[t], job->steps[t]);
    for (int64_t i = 0; i < (int64_t)job->columns * job->rows; i++) {
        for (int b = 0; b < 6; b++)
            if (!read_plain(job, b < 4 ? 0 : b - 3, values[b])) return 0;
        for (int b = 0; b < 6; b++) keep_block(values[b], scales[b > 3], blocks + b);
        write_mcu(job, blocks);
    }
    return 1;
}

/* Luma blocks of a row of MCUs that lie beyond the image: flat, the mean of a neighbor inside. */
static void fill_margin(Block *row, int columns, int wide, int tall) {
    for (int y = 0; y < 2; y++)
        for (int x = 0; x < 2 * columns; x++) {
            Block *block = row + 6 * (x / 2) + 2 * y + (x & 1);
            if (x < wide && y < tall) continue;
            int first = (y < tall ? block - 1 : row + 6 * (x / 2) + 1)->levels[0];
            memset(block, 0, sizeof *block);
            block->levels[0] = first;
        }
}

/* Chroma of a row of MCUs from old blocks [Cb and Cr, 2 rows, 2 * columns]. */
static void halve_row(Job *job, Placed *old, float (*steps)[64], const float *scales, Block *row,
                      int wide, int tall) {
    for (int c = 0; c < 2; c++, old += 4 * job->columns)
        for (int x = 0; x < job->columns; x++) {
            Placed *top = old + 2 * x, *bottom = top + 2 * job->columns;
            if (2 * x + 1 == wide) mirror(top[0], top[1], 0), mirror(bottom[0], bottom[1], 0);
            if (tall == 1) mirror(top[0], bottom[0], 1), mirror(top[1], bottom[1], 1);
            const int16_t *four[4] = {top[0], top[1], bottom[0], bottom[1]};
            halve_block(four, steps[c], scales, row + 6 * x + 4 + c);
        }
}

static int keep_full(Job *job) {
    float luma[64], steps[2][64], scales[64];
    Plain values;
    int tall = (job->height + 7) / 8, wide = (job->width + 7) / 8, columns = job->columns;
    Block *row = take(job, columns * 6 * sizeof *row);
    Placed *old = take(job, columns * 8 * sizeof *old);
    set_scales(luma, job->header->steps[0], job->steps[0]);
    for (int i = 0; i < 64; i++) {
        for (int c = 0; c < 2; c++) steps[c][ZIGZAG[i]] = job->header->steps[c + 1][i];
        scales[(ZIGZAG[i] & 7) * 8 + (ZIGZAG[i] >> 3)] = 1 / (float)job->steps[1][i];
    }
    for (int y = 0; y < job->rows; y++, tall -= 2) {
        for (int i = 0; i < 2 * wide && i < tall * wide; i++) {
            int down = i >= wide, x = down ? i - wide : i;
            Placed *chroma = old + down * 2 * columns + x;
            if (!read_plain(job, 0, values) || !read_rows(job, 1, chroma[0]) ||
                !read_rows(job, 2, chroma[4 * columns]))
                return 0;
            keep_block(values, luma, row + 6 * (x / 2) + 2 * down + (x & 1));
        }
        fill_margin(row, columns, wide, tall);
        halve_row(job, old, steps, scales, row, wide, tall);
        for (int x = 0; x < columns; x++) write_mcu(job, row + 6 * x);
    }
    return 1;
}

#include "shrink.h"

/* Whether this is a plain file: see recode.py. Its header is written to `header`. */
int read_plain_header(const uint8_t *data, int64_t size, Header *header) {
    if (!read_header(data, size, header) || header->parts != 3 || header->interval) return 0;
    if (size < header->scan + 2 || memcmp(data + size - 2, "\xff\xd9", 2)) return 0;
    if (header->widest * header->tallest != 1 && !header->halved) return 0;
    /* keep_halved() has one scale for Cb and Cr */
    return !header->halved || !memcmp(header->steps[1], header->steps[2], 64);
}

/* Tables to read and to write with. */
static int prepare(Job *job) {
    if (!fill_tables(job->header, kept.tables, NULL, job->tables)) return 0;
    if (kept.codes->first[0]) return 1;
    const uint8_t *table = CODE_TABLES;
    for (int i = 0; i < 4; i++) {
        Codes *codes = &kept.codes[i / 2];
        fill_codes(i % 2 ? codes->other : codes->first, table + 1, table + 17);
        table += i % 2 ? 17 + 162 : 17 + 12;
    }
    for (int i = 0; i < 2 * 2047; i++) kept.codes[i % 2].value[i / 2] = bits_of(i / 2 - 1023);
    return 1;
}

/* Bytes that the new image has at most, MCU by MCU. */
static int64_t most_bytes(int64_t width, int64_t height) {
    return HEAD_BYTES + (width + 15) / 16 * ((height + 15) / 16) * MCU_BYTES;
}

/* Bytes of room that a conversion needs. */
int64_t room_bytes(const Header *header, int64_t width, int64_t height, int64_t size) {
    int64_t row = (header->width + 15) / 16 * (6 * sizeof(Block) + 8 * sizeof(Placed));
    /* the planes of samples; strips and weights take 340 bytes a column where the new width is 1 */
    int64_t planes = (width + 16) * (height + 16) * 2, wide = header->width + 64;
    return most_bytes(width, height) + size + BLOCK_SLACK + row + planes + wide * 512 + (1 << 16);
}

/* Write the image anew to the begin of `room`, `width` x `height` pixels (its own, or smaller),
 * steps no finer than `steps`. Returns bytes written, 0: the source is damaged. */
int64_t write_anew(const Header *header, const uint8_t *data, int64_t size, int width, int height,
                   int interval, const uint8_t *steps, uint8_t *room) {
    Job job = {.header = header, .arena = room + most_bytes(width, height), .out.at = room};
    job.width = width, job.height = height, job.interval = interval;
    job.columns = (width + 15) / 16, job.rows = (height + 15) / 16;
    int shrinks = width != header->width || height != header->height;
    for (int i = 0; i < 128; i++) {
        int old = header->steps[i / 64][i % 64], is_mean = shrinks || (i >= 64 && !header->halved);
        job.steps[i / 64][i % 64] = !is_mean && old > steps[i] ? old : steps[i];
    }
    if (header->scan > size || !prepare(&job)) return 0;
    const uint8_t *clean = job.arena, *marker;
    int64_t bytes = unstuff(data + header->scan, data + size, job.arena, &marker);
    if (bytes < 0 || marker != data + size - 1) return 0;
    job.arena += bytes + BLOCK_SLACK + 64 - bytes % 64;
    job.in = (Reader){clean, 0, 0}, job.end = clean + bytes + 8;
    write_head(&job);
    if (!(shrinks ? shrink : header->halved ? keep_halved : keep_full)(&job)) return 0;
    int64_t at = 8 * (job.in.at - clean) - job.in.count;
    return at > 8 * bytes || at <= 8 * bytes - 8 ? 0 : job.out.at - room;
}
