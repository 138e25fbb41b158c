/* From JPEG bytes and a box to resized, mirrored RGB, one image after the other: the decoder behind
 * ops.CropDecode and ops.CenterCropDecode (ops/crop_decode.py).
 *
 * Sound files that are known (header.h) are read here: the tiles under the crop, or, without
 * restart markers, everything down to its last row; pixels are bit-identical to libjpeg-turbo's.
 * All others, and whatever turns out to be damaged, go to libturbojpeg, which decides what they
 * are.
 *
 * Source: ITU-T T.81, annexes B (markers), C and F (entropy coding), A.2 (MCUs).
 */
#include "vectors.h"
#include "transform.h"
#include "color.h"
#include "resize.h"
#include "streams.h"

/* Of a sample, known to decoder.py. */
enum { GOOD, WARNED, FAILED, OUTSIDE, WRONG_SIZE, NO_MEMORY, TOO_SHORT };
enum {
    RAW_MODE = 1, /* of a sample */
    ONLY_OWN = 2, /* of Output */
    CONTEXT = 2 /* pixels beside a crop whose chroma counts */,
    MIN_SIDE = 17,
    NARROW = 4 /* columns up to which libjpeg repeats chroma */
};

/* libturbojpeg, found by decoder.py. */
typedef struct {
    void *(*new_handle)(void);
    int (*free_handle)(void *);
    int (*decompress)(void *, const uint8_t *, unsigned long, uint8_t *, int, int, int, int, int);
    int (*error_code)(void *);
    int (*read_size)(void *, const uint8_t *, unsigned long, int *, int *, int *, int *);
} TurboJpeg;

enum { TURBO_RGBX = 2, TURBO_FLAGS = 4096 | 32768 }; /* TJFLAG_ACCURATEDCT, _LIMITSCANS */

/* What memory is for; the first three each of two images or streams. */
enum { CLEAN, PLACES = 2, PLANES = 4, PIXELS = 6, RESIZE, ROOMS };

typedef struct {
    TurboJpeg turbo;
    void *handle;
    Image images[2];
    Stream streams[2];
    Room rooms[ROOMS];
} Decoder;

/* What stays the same for all samples of a batch. */
typedef struct {
    uint8_t *out;
    int64_t height, width, method, is_reduced;
    int64_t is_own; /* 0: libturbojpeg reads all; ONLY_OWN: it reads nothing */
} Output;           /* as in batch_places() */

typedef struct {
    const uint8_t *data;
    int64_t size, mode, height, width;
} Sample; /* as the rows of locate_samples(); data is 0 for one that lies outside the file */

typedef struct {
    int64_t top, left, height, width, flip;
} Crop;

/* How the image is made of MCUs and tiles, and which MCUs lie under the crop. */
static void lay_out_mcus(Image *image, const Crop *crop) {
    const Header *header = &image->header;
    int wide = 8 * header->widest, tall = 8 * header->tallest;
    image->per_row = (header->width + wide - 1) / wide;
    image->mcus = image->per_row * ((header->height + tall - 1) / tall);
    image->tile_mcus = header->interval ? (int)least(header->interval, image->mcus) : image->mcus;
    image->tiles = (image->mcus + image->tile_mcus - 1) / image->tile_mcus;
    int bottom = (int)least(header->height, crop->top + crop->height + CONTEXT);
    int right = (int)least(header->width, crop->left + crop->width + CONTEXT);
    image->area[0] = (int)most(0, crop->top - CONTEXT) / tall;
    image->area[1] = (bottom + tall - 1) / tall;
    image->area[2] = (int)most(0, crop->left - CONTEXT) / wide;
    image->area[3] = (right + wide - 1) / wide;
    image->end = (image->area[1] - 1) * image->per_row + image->area[3];
}

/* Blocks, quantisers and planes of each component. Returns 0: there is no memory. */
static int lay_out_planes(Image *image, const Table *const chosen[6], Room *room) {
    const Header *header = &image->header;
    int64_t rows = image->area[1] - image->area[0], columns = image->area[3] - image->area[2];
    int64_t bytes[3] = {0}, wide = columns * 8 * header->widest + 2 * MARGIN;
    image->blocks = 0;
    for (int c = 0; c < header->parts; c++) {
        int blocks = header->across[c] * header->down[c];
        image->first_block[c] = image->blocks;
        for (int b = 0; b < blocks; b++)
            image->plan[image->blocks++] = (BlockPlan){chosen[2 * c], chosen[2 * c + 1], c};
        for (int i = 0; i < 64 * QUARTERS; i++) {
            int place = ZIGZAG[i % 64], row = QUARTERS * (place / 8) + i / 64;
            image->steps[c][8 * row + place % 8] = header->steps[c][i % 64];
        }
        image->pitches[c] = columns * 8 * header->across[c] + 2 * MARGIN;
        bytes[c] = image->pitches[c] * (rows * 8 * header->down[c] + 1) + MARGIN;
    }
    for (int b = image->blocks; b < UNIT * image->blocks; b++)
        image->plan[b] = image->plan[b - image->blocks];
    if (!PLACE(room, {&image->planes[0], bytes[0]}, {&image->planes[1], bytes[1]},
               {&image->planes[2], bytes[2]}, {&image->chroma[0], wide}, {&image->chroma[1], wide}))
        return 0;
    for (int c = 0; c < 3; c++) image->planes[c] += MARGIN;
    return 1;
}

/* 1, 2, 4 or 8: the strongest reduction that leaves the crop no smaller than the output. None below
 * 64 px: of tiny images several scales of libturbojpeg have the same size. */
static int denominator(const Crop *crop, const Output *output) {
    int by = 1;
    while (output->is_reduced && by < 8 && crop->height >= 2 * by * output->height &&
           crop->width >= 2 * by * output->width && least(crop->height, crop->width) >= 64)
        by *= 2;
    return by;
}

/* Whether the file is read here. Not a narrow one: libjpeg repeats its chroma. Not one that is
 * reduced, as libturbojpeg transforms fewer coefficients then; at 1/2, reading only the tiles under
 * the crop is faster still. Not one of more blocks than its bytes can hold, at two bits or more per
 * block: they would all be given memory. */
static int is_ours(const Image *image, int reduce) {
    const Header *header = &image->header;
    int has_tiles = header->halved && header->interval && image->per_row % header->interval == 0;
    return least(header->width, header->height) >= MIN_SIDE && reduce < (has_tiles ? 4 : 2) &&
           (int64_t)image->mcus * header->parts <= 4 * image->size;
}

/* Find out how a sample is to be decoded. Returns a status; where it is GOOD and the image is ours,
 * read_images() comes next. */
static int start_sample(Decoder *decoder, int which, const Sample *sample, const Crop *crop,
                        const Output *output) {
    Image *image = &decoder->images[which];
    const Table *chosen[6], *others = which ? decoder->images[0].tables : NULL;
    image->tiles = image->next_tile = image->is_damaged = image->is_ours = 0;
    image->beyond = (Int16s){0};
    image->data = sample->data, image->size = sample->size;
    if (!sample->data) return OUTSIDE;
    if (least(crop->top, crop->left) < 0 || least(crop->height, crop->width) < 1 ||
        crop->top > sample->height - crop->height || crop->left > sample->width - crop->width)
        return WRONG_SIZE;
    if (sample->mode == RAW_MODE)
        return sample->size == sample->height * sample->width * 3 ? GOOD : WRONG_SIZE;
    image->is_known = read_header(sample->data, sample->size, &image->header);
    if (!image->is_known) return GOOD;
    if (image->header.height != sample->height || image->header.width != sample->width)
        return WRONG_SIZE;
    lay_out_mcus(image, crop);
    if (image->tiles > image->size / 2) return image->tiles = 0, GOOD; /* each ends with a marker */
    image->places = (int32_t *)take_room(decoder->rooms + PLACES + which, 4 * (image->tiles + 1));
    if (!image->places) return NO_MEMORY;
    image->places[0] = image->header.scan;
    if (image->tiles > 1 && !find_tiles(image->data, image->size, image->places, image->tiles))
        return image->tiles = 0, GOOD;
    image->is_ours = output->is_own && is_ours(image, denominator(crop, output)) &&
                     fill_tables(&image->header, image->tables, others, chosen);
    if (!image->is_ours) return GOOD;
    image->is_ours = lay_out_planes(image, chosen, decoder->rooms + PLANES + which);
    return image->is_ours ? GOOD : NO_MEMORY;
}

/* Read the first `count` images, as far as they are ours. */
static int read_ours(Decoder *decoder, int count) {
    int64_t size = 0;
    for (int i = 0; i < count; i++)
        if (decoder->images[i].is_ours) size = most(size, decoder->images[i].size);
        else decoder->images[i].next_tile = decoder->images[i].tiles;
    if (!size) return GOOD;
    for (int i = 0; i < 2; i++) {
        decoder->streams[i].clean = take_room(decoder->rooms + CLEAN + i, size + SLACK);
        if (!decoder->streams[i].clean) return NO_MEMORY;
    }
    read_images(decoder->streams, decoder->images, count);
    return GOOD;
}

/* Write the tiles under the crop to `to` as a JPEG of their own, which libturbojpeg decodes sooner
 * than the whole: a smaller frame, markers renumbered. region: its top, left, height, width in the
 * image. Returns its bytes, 0 where the tiles form no grid. */
static int64_t cut_region(const Image *image, uint8_t *to, int region[4]) {
    const Header *header = &image->header;
    int wide = 8 * header->widest, tall = 8 * header->tallest, n = image->tile_mcus;
    int is_row = n % image->per_row == 0; /* a tile is some rows of MCUs, or a part of one */
    if (image->tiles < 2 || !(is_row || image->per_row % n == 0)) return 0;
    int columns = is_row ? 1 : image->per_row / n, high = is_row ? n / image->per_row : 1;
    const int across = is_row ? image->per_row : n, *area = image->area;
    int first_row = area[0] / high, end_row = (area[1] + high - 1) / high;
    int first = area[2] / across, end = (area[3] + across - 1) / across, copied = 0;
    if (first && header->width - first * across * wide <= NARROW) first--;
    uint8_t *at = to + header->scan;
    memcpy(to, image->data, header->scan);
    for (int row = first_row; row < end_row; row++)
        for (int tile = row * columns + first; tile < row * columns + end; tile++) {
            int64_t size = image->places[tile + 1] - image->places[tile];
            memcpy(at, image->data + image->places[tile], size);
            at += size;
            at[-1] = 0xD0 + (copied++ & 7);
        }
    at[-1] = 0xD9;
    region[0] = first_row * high * tall, region[1] = first * across * wide;
    region[2] = (int)least(header->height, end_row * high * tall) - region[0];
    region[3] = (int)least(header->width, end * across * wide) - region[1];
    uint8_t *frame = to + header->frame;
    frame[5] = region[2] >> 8, frame[6] = region[2] & 255;
    frame[7] = region[3] >> 8, frame[8] = region[3] & 255;
    return at - to;
}

/* Rows of pixels in memory, `pitch` bytes apart. */
typedef struct {
    Rows rows;
    const uint8_t *pixels;
    int64_t pitch, width;
} PixelRows;

static const uint8_t *pixel_row(Rows *rows, int64_t y, uint8_t *room) {
    const PixelRows *source = (PixelRows *)rows;
    (void)room;
    return source->pixels + y * source->pitch;
}

/* Whether libturbojpeg finds the size that the dataset states: of another one it would write less,
 * or reduce. Returns a status. */
static int compare_size(Decoder *decoder, const Sample *sample) {
    int width = 0, height = 0, sampling, color;
    decoder->turbo.read_size(decoder->handle, sample->data, sample->size, &width, &height,
                             &sampling, &color);
    if (width) return width == sample->width && height == sample->height ? GOOD : WRONG_SIZE;
    /* the next file would be read from this one's middle */
    decoder->turbo.free_handle(decoder->handle);
    decoder->handle = decoder->turbo.new_handle();
    return FAILED;
}

/* Decode with libturbojpeg, reduced `by` a number, and resize. Returns a status. */
static int turbo_sample(Decoder *decoder, const Image *image, const Sample *sample, int by,
                        Resize *task, uint8_t *out) {
    int region[4] = {0, 0, (int)sample->height, (int)sample->width};
    int64_t size = 0, stated = sample->height * sample->width;
    /* a Huffman code's least is 1 bit a block; an arithmetic code, of small images, needs less */
    if (stated > MAX_PIXELS && stated / 512 > sample->size) return TOO_SHORT;
    uint8_t *clean = take_room(decoder->rooms + CLEAN, sample->size);
    if (!clean) return NO_MEMORY;
    if (image->is_known) size = cut_region(image, clean, region);
    int height = (region[2] + by - 1) / by, width = (region[3] + by - 1) / by;
    uint8_t *pixels = take_room(decoder->rooms + PIXELS, 4ll * height * width + 4 * MARGIN);
    if (!pixels) return NO_MEMORY;
    int status = image->is_known ? GOOD : compare_size(decoder, sample);
    if (status != GOOD) return status;
    const uint8_t *jpeg = size ? clean : sample->data;
    if (decoder->turbo.decompress(decoder->handle, jpeg, size ? size : sample->size, pixels, width,
                                  4 * width, height, TURBO_RGBX, TURBO_FLAGS))
        status = decoder->turbo.error_code(decoder->handle) ? FAILED : WARNED;
    if (status == FAILED) return FAILED;
    PixelRows rows = {{pixel_row}, pixels, 4 * width, task->row_pixels = width};
    for (int i = 0; i < 4; i++) task->box[i] = (task->box[i] - (i < 2 ? region[i] : 0)) / by;
    return resize(task, &rows.rows, out, decoder->rooms + RESIZE) ? status : NO_MEMORY;
}

/* Rows under the crop, from the planes. */
typedef struct {
    Rows rows;
    const Image *image;
    int width, across, down, real; /* pixels; those for one chroma value; rows of chroma */
    const uint8_t *columns[3];     /* the row's first column, in row 0 of the image */
    int64_t pitches[3];
} PlaneRows;

/* A chroma component's row that covers row y, and the next nearest of half as many. */
INLINE void near_rows(const PlaneRows *source, int part, int y, const uint8_t *rows[2]) {
    int near = source->down == 2 ? y / 2 : y / source->down;
    int step = source->down == 1 ? 0 : y % 2 ? 1 : -1;
    int far = (int)most(0, least(near + step, source->real - 1));
    rows[0] = source->columns[part] + source->pitches[part] * near;
    rows[1] = source->columns[part] + source->pitches[part] * far;
}

/* A chroma component of row y at full width: in its room, or where it is. */
static const uint8_t *full_chroma(const PlaneRows *source, int part, int y,
                                  const uint8_t *rows[2]) {
    uint8_t *room = source->image->chroma[part - 1];
    if (source->across > 1) repeat_columns(rows[0], source->across, room, source->width);
    else if (source->down == 2) blend_rows(rows[0], rows[1], 1 + y % 2, room, source->width);
    else return rows[0];
    return room;
}

static const uint8_t *plane_row(Rows *rows, int64_t y, uint8_t *room) {
    const PlaneRows *source = (PlaneRows *)rows;
    const uint8_t *luma = source->columns[0] + source->pitches[0] * y, *blue[2], *red[2];
    near_rows(source, 1, (int)y, blue), near_rows(source, 2, (int)y, red);
    if (source->across == 2 && source->down <= 2)
        color_row_halved(luma, blue, red, 6 + source->down, room, source->width);
    else
        color_row(luma, full_chroma(source, 1, (int)y, blue), full_chroma(source, 2, (int)y, red),
                  room, source->width);
    return room;
}

/* Repeat the first and the last real value of every row of a component beside the image. */
static void repeat_ends(const Image *image, int part) {
    const Header *header = &image->header;
    int across = header->across[part], by = header->widest / across;
    int real = (header->width + by - 1) / by, begin = 8 * across * image->area[2];
    for (int y = 0; y < 8 * header->down[part] * (image->area[1] - image->area[0]); y++) {
        uint8_t *row = image->planes[part] + y * image->pitches[part];
        if (begin == 0) row[-1] = row[0];
        if (8 * across * image->area[3] >= real) row[real - begin] = row[real - begin - 1];
    }
}

/* Resize from the planes. Returns 0: there is no memory. */
static int resize_planes(const Image *image, Resize *task, uint8_t *out, Room *room) {
    const Header *header = &image->header;
    int left = (int)task->box[1], shift = left % header->widest, first = left - shift;
    int width = (int)task->box[3] + shift;
    PlaneRows source = {.rows = {plane_row}, .image = image, .width = width};
    for (int c = 0; c < header->parts; c++) {
        int across = header->widest / header->across[c], down = header->tallest / header->down[c];
        source.across = across, source.down = down,
        source.real = (header->height + down - 1) / down;
        source.pitches[c] = image->pitches[c];
        source.columns[c] = image->planes[c] + first / across -
                            8 * header->across[c] * image->area[2] -
                            image->pitches[c] * 8 * header->down[c] * image->area[0];
        if (c) repeat_ends(image, c);
    }
    if (header->parts == 1) /* both rows of chroma are the same everywhere */
        source.columns[1] = source.columns[2] = memset(image->chroma[0], 128, width + MARGIN);
    task->row_pixels = width, task->box[1] = shift;
    return resize(task, &source.rows, out, room);
}

/* Rows of a sample that is stored as pixels. */
static const uint8_t *raw_row(Rows *rows, int64_t y, uint8_t *room) {
    const PixelRows *source = (PixelRows *)rows;
    rgb_row(source->pixels + y * source->pitch, room, source->width);
    return room;
}

static int finish_sample(Decoder *decoder, const Image *image, const Sample *sample,
                         const Crop *crop, const Output *output, uint8_t *out) {
    Room *room = decoder->rooms + RESIZE;
    Resize task = {.row_pixels = crop->width,
                   .box = {crop->top, crop->left, crop->height, crop->width},
                   .out = {output->height, output->width},
                   .flip = crop->flip != 0,
                   .method = (int)output->method};
    if (sample->mode == RAW_MODE) {
        PixelRows raw = {{raw_row}, sample->data + 3 * crop->left, 3 * sample->width, crop->width};
        task.box[1] = 0;
        return resize(&task, &raw.rows, out, room) ? GOOD : NO_MEMORY;
    }
    if (image->is_ours && !image->is_damaged)
        return resize_planes(image, &task, out, room) ? GOOD : NO_MEMORY;
    if (output->is_own == ONLY_OWN) return FAILED;
    return turbo_sample(decoder, image, sample, denominator(crop, output), &task, out);
}

/* A decoder for one thread at a time; NULL: there is no memory. turbo: libturbojpeg's functions. */
Decoder *new_decoder(const TurboJpeg *turbo) {
    Decoder *decoder = aligned_alloc(64, (sizeof *decoder + 63) & ~63ull);
    if (!decoder) return NULL;
    memset(decoder, 0, sizeof *decoder);
    decoder->turbo = *turbo;
    decoder->handle = turbo->new_handle();
    if (decoder->handle) return decoder;
    free(decoder);
    return NULL;
}

void free_decoder(Decoder *decoder) {
    for (int i = 0; i < ROOMS; i++) free(decoder->rooms[i].bytes);
    decoder->turbo.free_handle(decoder->handle);
    free(decoder);
}

/* Bytes that a decoder holds; those of libturbojpeg's handle are not known. */
int64_t decoder_bytes(const Decoder *decoder) {
    int64_t bytes = sizeof *decoder;
    for (int i = 0; i < ROOMS; i++) bytes += decoder->rooms[i].size;
    return bytes;
}

/* Decode, crop, mirror and resize samples `first` to `end` of a batch into out: uint8 RGB
 * [batch, height, width, 3]. Writes each one's status; a sample without an image becomes black. */
void decode_crops(Decoder *decoder, int64_t first, int64_t end, const Sample *samples,
                  const Crop *crops, const Output *output, int64_t *status) {
    int64_t bytes = 3 * output->height * output->width;
    for (int64_t b = first, count; b < end; b += count) {
        count = 1;
        status[b] = start_sample(decoder, 0, samples + b, crops + b, output);
        /* a file without markers is one tile: the next file is read side by side with it */
        if (decoder->images[0].is_ours && decoder->images[0].tiles == 1 && b + 1 < end) {
            status[b + 1] = start_sample(decoder, 1, samples + b + 1, crops + b + 1, output);
            count = 2;
        }
        int is_read = read_ours(decoder, (int)count);
        for (int i = 0; i < count; i++) {
            int64_t *now = status + b + i;
            uint8_t *out = output->out + (b + i) * bytes;
            if (*now == GOOD) *now = is_read;
            if (*now == GOOD)
                *now = finish_sample(decoder, decoder->images + i, samples + b + i, crops + b + i,
                                     output, out);
            if (*now > WARNED) memset(out, 0, bytes);
        }
    }
}
