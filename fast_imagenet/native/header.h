/* The header of a plain JPEG: baseline, YCbCr, 4:4:4 or 4:2:0, one scan, no restart markers, 8-bit
 * steps, nothing unexpected anywhere. Whatever else is left to Pillow.
 */

enum { MAX_MCUS = 1 << 17 }; /* 33 megapixels */

/* Its first five fields are known to __init__.py. */
typedef struct {
    int32_t width, height, halved, has_exif, scan; /* scan: where its bytes begin */
    uint8_t steps[3][64];                          /* file order */
    uint8_t codes[6][CODE];                        /* DC, AC of each component */
} Header;

typedef struct {
    uint8_t steps[4][64], codes[32][CODE];
    uint32_t has_steps, has_codes;
    const uint8_t *frame;
} Tables;

INLINE int two_bytes(const uint8_t *at) { return at[0] << 8 | at[1]; }

static int read_steps(Tables *tables, const uint8_t *body, int size) {
    for (; size >= 65 && body[0] < 4; body += 65, size -= 65) {
        memcpy(tables->steps[body[0]], body + 1, 64);
        tables->has_steps |= 1u << body[0];
    }
    return size == 0;
}

static int read_codes(Tables *tables, const uint8_t *body, int size) {
    while (size >= 17) {
        int name = body[0], count = 0;
        for (int i = 1; i <= 16; i++) count += body[i];
        if (name & 0xEC || count > 256 || size < 17 + count) return 0;
        uint8_t *code = tables->codes[name];
        memset(code, 0, CODE);
        memcpy(code, body + 1, 16 + count);
        tables->has_codes |= 1u << name;
        body += 17 + count, size -= 17 + count;
    }
    return size == 0;
}

/* Whether a segment says nothing about the pixels: APPn and comments, no interval, no RGB. */
static int is_harmless(int marker, const uint8_t *body, int size) {
    if (marker == 0xEE && size >= 5 && !memcmp(body, "Adobe", 5)) return size >= 12 && body[11] == 1;
    if (marker == 0xDD) return size == 2 && !two_bytes(body);
    return (marker >= 0xE0 && marker <= 0xEF) || marker == 0xFE;
}

/* Whether frame and scan (15 and 10 bytes) are plain ones, whose tables are there. */
static int finish_header(Header *header, const Tables *tables, const uint8_t *scan) {
    const uint8_t *frame = tables->frame;
    header->height = two_bytes(frame + 1), header->width = two_bytes(frame + 3);
    header->halved = frame[7] == 0x22;
    int mcus = ((header->width + 15) / 16) * ((header->height + 15) / 16);
    if (frame[0] != 8 || frame[5] != 3 || scan[0] != 3 || memcmp(scan + 7, "\0\x3f", 3)) return 0;
    if (!mcus || mcus > MAX_MCUS || !(header->halved || frame[7] == 0x11)) return 0;
    for (int c = 0; c < 3; c++) {
        const uint8_t *part = frame + 6 + 3 * c, *chosen = scan + 1 + 2 * c;
        int dc = chosen[1] >> 4, ac = 16 + (chosen[1] & 15);
        if (part[0] != c + 1 || chosen[0] != c + 1 || (c && part[1] != 0x11) || part[2] > 3) return 0;
        if (dc > 3 || ac > 19 || !(tables->has_steps >> part[2] & 1)) return 0;
        if (!(tables->has_codes >> dc & tables->has_codes >> ac & 1)) return 0;
        memcpy(header->steps[c], tables->steps[part[2]], 64);
        memcpy(header->codes[2 * c], tables->codes[dc], CODE);
        memcpy(header->codes[2 * c + 1], tables->codes[ac], CODE);
        if (memchr(header->steps[c], 0, 64)) return 0;
    }
    /* one scale serves both colours */
    return !header->halved || !memcmp(header->steps[1], header->steps[2], 64);
}

/* Whether `data` begin with the header of a plain JPEG and end as one; if so, what it says. */
int read_header(const uint8_t *data, int64_t size, Header *header) {
    Tables tables = {.frame = NULL};
    header->has_exif = 0;
    if (size < 4 || size > INT32_MAX || memcmp(data, "\xff\xd8", 2)) return 0;
    if (memcmp(data + size - 2, "\xff\xd9", 2)) return 0;
    for (int64_t at = 2; at + 4 <= size;) {
        int marker = data[at + 1], length = two_bytes(data + at + 2) - 2;
        const uint8_t *body = data + at + 4;
        if (data[at] != 0xFF || length < 0 || at + 4 + length > size - 2) return 0;
        at += 4 + length;
        if (marker == 0xDA) {
            header->scan = (int32_t)at;
            return tables.frame && length == 10 && finish_header(header, &tables, body);
        }
        int good = marker == 0xDB   ? read_steps(&tables, body, length)
                   : marker == 0xC4 ? read_codes(&tables, body, length)
                   : marker == 0xC0 ? length == 15 && !tables.frame
                                    : is_harmless(marker, body, length);
        if (!good) return 0;
        if (marker == 0xC0) tables.frame = body;
        header->has_exif |= marker == 0xE1;
    }
    return 0;
}
