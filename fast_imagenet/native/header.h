/* What stands before the scan of a baseline JPEG, and where its tiles are. A tile is what lies
 * between two restart markers: it decodes without anything before it.
 *
 * Nothing read is trusted: every access is bounded by the size. A file is known where nothing is
 * unexpected anywhere, so that libturbojpeg reads the same; what any other one is, it decides.
 */

enum {
    MAX_PIXELS = 1 << 25,
    MAX_SIDE = 65500 /* as in libjpeg */,
    MAX_BLOCKS = 10 /* of an MCU */
};

/* Its first fields, to `codes`, are known to recode.py. */
typedef struct {
    int32_t width, height, halved, has_exif, scan; /* halved: 4:2:0; scan: where its bytes begin */
    uint8_t steps[3][64];                          /* quantisers of each component, file order */
    uint8_t codes[6][CODE];                        /* DC, AC of each component */
    int32_t frame, interval; /* place of the frame's marker; MCUs between restart markers or 0 */
    int32_t parts;           /* components, 1 or 3 */
    int32_t across[3], down[3], widest, tallest; /* sampling factors, and the largest of them */
} Header;

/* Tables by number, as they are read. */
typedef struct {
    uint8_t steps[4][64], codes[32][CODE];
    uint32_t has_steps, has_codes; /* a bit for each that has been read */
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

/* Whether a segment says nothing about the pixels: APPn and comments; no RGB, no other codec, no
 * version of JFIF that libjpeg warns of. */
static int is_harmless(int marker, const uint8_t *body, int size) {
    if (marker == 0xE0 && size >= 6 && !memcmp(body, "JFIF", 5)) return body[5] == 1;
    if (marker == 0xEE && size >= 5 && !memcmp(body, "Adobe", 5))
        return size >= 12 && body[11] == 1;
    return (marker >= 0xE0 && marker <= 0xEF) || marker == 0xFE;
}

/* The frame's segment. Returns whether its MCUs are known. */
static int read_frame(Header *header, const uint8_t *body, int size) {
    if (size < 9 || body[0] != 8) return 0;
    header->height = two_bytes(body + 1), header->width = two_bytes(body + 3);
    header->parts = body[5], header->widest = header->tallest = 1;
    if (!header->height || !header->width || header->height > MAX_SIDE || header->width > MAX_SIDE)
        return 0;
    if (size != 6 + 3 * body[5]) return 0;
    if (header->parts != 1 && header->parts != 3) return 0;
    for (int c = 0; c < header->parts; c++) {
        int across = body[7 + 3 * c] >> 4, down = body[7 + 3 * c] & 15;
        if (across < 1 || across > 4 || down < 1 || down > 4) return 0;
        if (header->parts == 1) across = down = 1; /* not interleaved: an MCU is one block */
        if (across > header->widest) header->widest = across;
        if (down > header->tallest) header->tallest = down;
        header->across[c] = across, header->down[c] = down;
    }
    header->halved = header->parts == 3 && body[7] == 0x22 && body[10] == 0x11 && body[13] == 0x11;
    return 1;
}

/* Whether luma has the largest factors, and both chroma components have equal parts of them. */
static int has_known_sampling(const Header *header) {
    int across = header->across[1], down = header->down[1], wide = header->widest;
    if (header->parts == 1) return 1;
    if (across != header->across[2] || down != header->down[2]) return 0;
    if (header->across[0] != wide || header->down[0] != header->tallest) return 0;
    if (wide % across || header->tallest % down) return 0;
    return wide * header->tallest + 2 * across * down <= MAX_BLOCKS;
}

/* The tables that frame and scan name. Returns whether all is as in an ordinary file. */
static int choose_tables(Header *header, const Tables *tables, const uint8_t *frame,
                         const uint8_t *scan) {
    if ((int64_t)header->width * header->height > MAX_PIXELS || !has_known_sampling(header))
        return 0;
    if (memcmp(scan + 1 + 2 * header->parts, "\0\x3f", 3)) return 0;
    for (int c = 0; c < header->parts; c++) {
        const uint8_t *part = frame + 6 + 3 * c, *chosen = scan + 1 + 2 * c;
        int dc = chosen[1] >> 4, ac = 16 + (chosen[1] & 15);
        if (part[0] != c + 1 || chosen[0] != c + 1 || part[2] > 3 || dc > 3 || ac > 19) return 0;
        if (!(tables->has_steps >> part[2] & tables->has_codes >> dc & tables->has_codes >> ac & 1))
            return 0;
        memcpy(header->steps[c], tables->steps[part[2]], 64);
        memcpy(header->codes[2 * c], tables->codes[dc], CODE);
        memcpy(header->codes[2 * c + 1], tables->codes[ac], CODE);
        if (memchr(header->steps[c], 0, 64)) return 0;
    }
    return 1;
}

/* One segment between the image's begin and its scan. Returns whether it is an ordinary one. */
static int read_segment(Header *header, Tables *tables, const uint8_t *here, int size) {
    int marker = here[1];
    const uint8_t *body = here + 4;
    header->has_exif |= marker == 0xE1;
    if (marker == 0xDB) return read_steps(tables, body, size);
    if (marker == 0xC4) return read_codes(tables, body, size);
    if (marker == 0xDD && size == 2) return header->interval = two_bytes(body), 1;
    return is_harmless(marker, body, size);
}

/* Read the header of a JPEG of `size` bytes. Returns whether the file is known. */
int read_header(const uint8_t *data, int64_t size, Header *header) {
    Tables tables;
    const uint8_t *frame = NULL;
    tables.has_steps = tables.has_codes = 0;
    memset(header, 0, sizeof *header);
    if (size < 4 || size > INT32_MAX || memcmp(data, "\xff\xd8", 2)) return 0;
    for (int64_t at = 2; at + 4 <= size;) {
        const uint8_t *here = data + at;
        int marker = here[1], length = two_bytes(here + 2) - 2;
        if (here[0] != 0xFF || length < 0 || at + 4 + length > size) return 0;
        at += 4 + length;
        if (marker == 0xDA) {
            header->scan = (int32_t)at;
            return frame && length == 4 + 2 * header->parts && here[4] == header->parts &&
                   choose_tables(header, &tables, frame, here + 4);
        }
        if (marker != 0xC0) {
            if (!read_segment(header, &tables, here, length)) return 0;
            continue;
        }
        if (frame || !read_frame(header, here + 4, length)) return 0;
        frame = here + 4, header->frame = (int32_t)(here - data);
    }
    return 0;
}

/* Tables to read with, kept from one image to the next, as they are often the same. others: tables
 * that may be shared, or NULL. chosen: DC and AC of each component. Returns whether they are those
 * of an 8-bit image. */
static int fill_tables(const Header *header, Table tables[6], const Table *others,
                       const Table *chosen[6]) {
    for (int i = 0; i < 2 * header->parts; i++) {
        const uint8_t *code = header->codes[i];
        if (i >= 4 && !memcmp(code, header->codes[i - 2], CODE)) {
            chosen[i] = chosen[i - 2];
            continue;
        }
        int is_shared = others && others[i].bits && !memcmp(others[i].code, code, CODE);
        chosen[i] = is_shared ? &others[i] : &tables[i];
        if (is_shared || (tables[i].bits && !memcmp(tables[i].code, code, CODE))) continue;
        if (fill_table(&tables[i], code, i % 2 == 0)) continue;
        tables[i].bits = 0;
        return 0;
    }
    return 1;
}

/* Find the tiles of a scan that begins at places[0]. places [count + 1]: tile t's bytes are those
 * from places[t] to places[t + 1] - 2. Returns whether there are `count` of them, numbered as they
 * must be, and nothing else before the end of the image. */
static int find_tiles(const uint8_t *data, int64_t size, int32_t *places, int64_t count) {
    const uint8_t *here = data + places[0], *last = data + size - 1;
    for (int64_t tile = 0; tile < count; here++) {
        here = here < last ? memchr(here, 0xFF, last - here) : NULL;
        if (!here) return 0;
        if (!*++here) continue; /* a stuffed zero */
        tile++;
        if (*here != (tile == count ? 0xD9 : 0xD0 + ((tile - 1) & 7))) return 0;
        places[tile] = (int32_t)(here + 1 - data);
    }
    return 1;
}

/* A tile's bytes up to the next marker, without stuffed zeros, and 16 zeros behind them. Returns
 * their number, and where the marker's second byte is; -1: none before `limit`. */
static int64_t unstuff(const uint8_t *from, const uint8_t *limit, uint8_t *to,
                       const uint8_t **marker) {
    const uint8_t *begin = to;
    for (uint8_t *next; (next = memccpy(to, from, 0xFF, limit - from)); to = next) {
        from += next - to;
        if (from == limit) return -1;
        if (!*from++) continue;
        *marker = from - 1;
        memset(next - 1, 0, 16);
        return next - 1 - begin;
    }
    return -1;
}
