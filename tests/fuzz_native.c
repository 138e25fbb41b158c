/* Feeds files from standard input (8 bytes of size, then the file, ...) to the native library's
 * recoder and decoder, and compares what the decoder makes of them with what libturbojpeg makes of
 * the whole file. tests/fuzz.py compiles it with sanitizers; every block of memory ends where it
 * must. The first file is a sound one without restart markers: it is decoded beside all others, and
 * must come out the same.
 *
 * Arguments: path of libturbojpeg; folder for the files of which a check does not hold.
 * Prints the counts that COUNTS names.
 */
#include <dlfcn.h>
#include <stdio.h>

#define NATIVE_FINGERPRINT ""
#define SPARE(size) 0
#include "library.c"

enum { MOST_PIXELS = 1 << 18 /* of an image that is compared */, SIDE = 40, RAW = -1 };

static TurboJpeg turbo;

/* Files: read; kept and shrunk by the recoder; sound for libturbojpeg; whole images read by our
 * decoder alone. Checks that do not hold: see check_whole() and the following. */
#define COUNTS(each)                                                                               \
    each(files) each(kept) each(shrunk) each(sound) each(ours) each(accepted) each(refused)        \
        each(other_pixels) each(other_size) each(neighbor)
#define FIELD(name) int64_t name;
static struct {
    COUNTS(FIELD)
} counts;
static const char *folder;

typedef struct {
    const uint8_t *data;
    int64_t size;
    int width, height; /* that libturbojpeg finds in it, else that our header states */
    int status;        /* of libturbojpeg for the whole image: GOOD, WARNED or FAILED */
    uint8_t *pixels;   /* RGBX; NULL where it has FAILED or is too large */
} File;

static uint64_t state = 1;
static int draw(int end) { /* 0 to end - 1, xorshift */
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return (int)((state >> 11) % (uint64_t)end);
}

/* One more check that does not hold: the file is kept. */
static void note(int64_t *count, const char *name, const File *file) {
    char path[4096];
    ++*count;
    snprintf(path, sizeof path, "%s/%s-%d.jpg", folder, name, (int)counts.files);
    FILE *to = fopen(path, "wb");
    if (!to || fwrite(file->data, 1, file->size, to) != (size_t)file->size || fclose(to)) abort();
}
#define NOTE(name) note(&counts.name, #name, file)

/* ==== Recoder ================================================================================= */

static int recode(const Header *header, const File *file, int width, int height) {
    uint8_t steps[128];
    int64_t need = room_bytes(header, width, height, file->size);
    memset(steps, 3, sizeof steps);
    uint8_t *room = malloc(need), *first = malloc(need);
    memset(room, 0xff, need);
    int64_t made = write_anew(header, file->data, file->size, width, height, 2, steps, room);
    memcpy(first, room, made);
    /* once more with what is left in the room: the same */
    int64_t again = write_anew(header, file->data, file->size, width, height, 2, steps, room);
    if (again != made || memcmp(first, room, made)) abort();
    free(room), free(first);
    return made > 0;
}

static void check_recoder(const File *file) {
    Header header;
    if (!read_plain_header(file->data, file->size, &header)) return;
    if ((int64_t)header.width * header.height >= 1 << 20) return;
    counts.kept += recode(&header, file, header.width, header.height);
    counts.shrunk += recode(&header, file, (header.width + 2) / 3, (header.height + 1) / 2);
    recode(&header, file, 1, 1);
}

/* ==== Decoder ================================================================================= */

/* A crop of a file in its own size. is_own: as in Output, RAW: the file is pixels of three bytes.
 * Returns the status; where that is GOOD, *same says whether the pixels are those of the file. */
static int decode_crop(Decoder *decoder, const File *file, Crop crop, int is_own, int *same) {
    int64_t bytes = 3 * crop.height * crop.width, status;
    Sample sample = {file->data, file->size, is_own == RAW, file->height, file->width};
    Output output = {malloc(bytes), crop.height, crop.width, draw(3), draw(2), is_own};
    decode_crops(decoder, 0, 1, &sample, &crop, &output, &status);
    *same = 1;
    for (int64_t y = 0; file->pixels && status == GOOD && y < crop.height; y++)
        for (int64_t x = 0; x < crop.width; x++) {
            int64_t column = crop.left + (crop.flip ? crop.width - 1 - x : x);
            const uint8_t *pixel = file->pixels + 4 * ((crop.top + y) * file->width + column);
            *same &= !memcmp(output.out + 3 * (y * crop.width + x), pixel, 3);
        }
    free(output.out);
    return (int)status;
}

/* Of whole images no more and no fewer are accepted than libturbojpeg accepts; by our own decoder
 * alone, no more. */
static void check_whole(Decoder *decoder, const File *file) {
    for (int is_own = 0; is_own <= ONLY_OWN; is_own++) {
        int same, status;
        status =
            decode_crop(decoder, file, (Crop){0, 0, file->height, file->width, 0}, is_own, &same);
        counts.ours += is_own == ONLY_OWN && status == GOOD;
        if (status == GOOD && file->status != GOOD) NOTE(accepted);
        if (status != GOOD && file->status == GOOD && is_own != ONLY_OWN) NOTE(refused);
        if (file->status == GOOD && !same) NOTE(other_pixels);
    }
}

static Crop draw_crop(const File *file) {
    Crop crop = {draw(file->height), draw(file->width), 0, 0, draw(2)};
    crop.height = 1 + draw(file->height - (int)crop.top);
    crop.width = 1 + draw(file->width - (int)crop.left);
    return crop;
}

/* A crop of a sound file has its pixels. In other files what lies beside it is not seen. */
static void check_crop(Decoder *decoder, const File *file) {
    int same, is_own = draw(3), status = decode_crop(decoder, file, draw_crop(file), is_own, &same);
    if (file->status != GOOD) return;
    if (status != GOOD && is_own != ONLY_OWN) NOTE(refused);
    if (!same) NOTE(other_pixels);
}

/* A file of another size than the dataset states is refused. */
static void check_size(Decoder *decoder, const File *file) {
    int same, by = 1 + draw(9);
    File other = *file;
    other.pixels = NULL;
    *(draw(2) ? &other.height : &other.width) += draw(2) ? by : -by;
    if (other.height < 1 || other.width < 1) return;
    if (decode_crop(decoder, &other, draw_crop(&other), draw(3), &same) == GOOD) NOTE(other_size);
}

/* A crop of a sample that is stored as pixels, which are bytes of the file or made up. */
static void check_raw(Decoder *decoder, const File *file) {
    File raw = {.width = 1 + draw(SIDE), .height = 1 + draw(SIDE)};
    int64_t pixels = raw.width * raw.height;
    uint8_t *bytes = malloc(3 * pixels);
    raw.data = bytes, raw.size = 3 * pixels, raw.pixels = malloc(4 * pixels);
    for (int64_t i = 0; i < raw.size; i++) bytes[i] = i < file->size ? file->data[i] : draw(256);
    for (int64_t i = 0; i < pixels; i++) memcpy(raw.pixels + 4 * i, bytes + 3 * i, 3);
    int same, status = decode_crop(decoder, &raw, draw_crop(&raw), RAW, &same);
    if (status != GOOD) NOTE(refused);
    if (!same) NOTE(other_pixels);
    free(bytes), free(raw.pixels);
}

/* A batch of the file, the sound one and the file again, to any size: the sound one stays the same.
 */
static void check_batch(Decoder *decoder, const File *file, const File *sound) {
    int order = draw(2), height = 1 + draw(SIDE), width = 1 + draw(SIDE);
    int64_t status[3], bytes = 3ll * height * width;
    uint8_t *out = malloc(3 * bytes), *alone = malloc(bytes);
    Sample samples[3] = {{file->data, file->size, 0, file->height, file->width},
                         {sound->data, sound->size, 0, sound->height, sound->width}};
    Crop crops[3] = {draw_crop(file), draw_crop(sound)};
    samples[2] = samples[order], crops[2] = crops[order];
    Output output = {out, height, width, draw(3), draw(2), draw(3)}, once = output;
    decode_crops(decoder, 0, 3, samples, crops, &output, status);
    once.out = alone;
    decode_crops(decoder, 0, 1, samples + 1, crops + 1, &once, status);
    int differs = memcmp(out + bytes, alone, bytes);
    if (order) differs |= memcmp(out + 2 * bytes, alone, bytes);
    if (differs) NOTE(neighbor);
    free(out), free(alone);
}

static void check_decoder(const File *file, const File *sound) {
    Decoder *decoder = new_decoder(&turbo); /* a new one: its memory holds nothing larger */
    if (!decoder) abort();
    if ((int64_t)file->width * file->height <= MOST_PIXELS) {
        check_whole(decoder, file);
        check_size(decoder, file);
        check_crop(decoder, file), check_crop(decoder, file), check_crop(decoder, file);
    }
    check_batch(decoder, file, sound);
    check_raw(decoder, file);
    free_decoder(decoder);
}

/* ==== Files =================================================================================== */

/* What libturbojpeg makes of a file; with a new handle, as an old one remembers errors. */
static void refer(File *file) {
    Header header;
    int sampling, color, width = 0, height = 0;
    void *handle = turbo.new_handle();
    file->status = FAILED, file->pixels = NULL;
    turbo.read_size(handle, file->data, file->size, &width, &height, &sampling, &color);
    turbo.free_handle(handle);
    if (!width || !height) {
        read_header(file->data, file->size, &header);
        file->width = header.width ? header.width : SIDE;
        file->height = header.height ? header.height : SIDE;
        return;
    }
    file->width = width, file->height = height;
    if ((int64_t)width * height > MOST_PIXELS) return;
    file->pixels = malloc(4ll * width * height);
    handle = turbo.new_handle();
    if (!turbo.decompress(handle, file->data, file->size, file->pixels, width, 4 * width, height,
                          TURBO_RGBX, TURBO_FLAGS))
        file->status = GOOD;
    else if (!turbo.error_code(handle)) file->status = WARNED;
    turbo.free_handle(handle);
}

static File read_file(int64_t size) {
    uint8_t *data = malloc(size);
    File file = {data, size};
    if (fread(data, 1, size, stdin) != (size_t)size) abort();
    refer(&file);
    return file;
}

static void *find(void *library, const char *name) {
    void *found = dlsym(library, name);
    if (!found) abort();
    return found;
}

int main(int argc, char **argv) {
    int64_t size;
    File sound = {0};
    void *library = argc == 3 ? dlopen(argv[1], RTLD_NOW) : NULL;
    if (!library) return 2;
    folder = argv[2];
    turbo = (TurboJpeg){find(library, "tjInitDecompress"), find(library, "tjDestroy"),
                        find(library, "tjDecompress2"), find(library, "tjGetErrorCode"),
                        find(library, "tjDecompressHeader3")};
    for (; fread(&size, 8, 1, stdin) == 1; counts.files++) {
        File file = read_file(size);
        if (!sound.data) sound = file;
        counts.sound += file.status == GOOD;
        check_recoder(&file);
        check_decoder(&file, &sound);
        if (file.data != sound.data) free((void *)file.data), free(file.pixels);
    }
#define PRINT(name) printf("%s %lld\n", #name, (long long)counts.name);
    COUNTS(PRINT)
    free((void *)sound.data), free(sound.pixels);
    return 0;
}
