/* Entropy decoding of two tiles side by side.
 *
 * Each step of decoding waits for the one before: look up, shift, look up. A second, independent
 * chain in the same thread costs little more than one alone, as the processor works on both at
 * once.
 */

enum {
    UNIT = 4,    /* MCUs at most that are read before they are transformed */
    BLOCK = 72,  /* int16 of a block: 64, one for what lies beyond, padding */
    MARGIN = 64, /* bytes around the rows of a plane that may be read */
    SLACK = UNIT * MAX_BLOCKS * 64 * 4 + 128 /* bytes of symbols that a damaged unit may read */
};

typedef struct {
    const Table *first, *others; /* tables of its first coefficient, and of the others */
    int part;                    /* component */
} BlockPlan;

/* One image under way, from its header to the planes of Y, Cb and Cr under the crop. */
typedef struct {
    const uint8_t *data;
    int64_t size;
    Header header;
    int area[4], end; /* MCUs under the crop: first row, end, first column, end; end in the file */
    int per_row, mcus, tile_mcus, tiles; /* MCUs of a row, of the image, of a tile; tiles */
    int is_known, is_ours;               /* see read_header(); whether it is read here */
    int next_tile, is_damaged;
    int32_t *places;                   /* of the tiles, see find_tiles() */
    Table tables[6];                   /* kept from one image to the next: often the same */
    BlockPlan plan[UNIT * MAX_BLOCKS]; /* of the blocks of UNIT MCUs */
    int blocks, first_block[3];        /* blocks of an MCU; the first of each component */
    int16_t steps[3][64 * QUARTERS];   /* quantisers as transform_blocks() takes them */
    Int16s beyond;                     /* what it has returned */
    uint8_t *planes[3];                /* of the area's MCUs */
    uint8_t *chroma[2];                /* room for a row of either at full width */
    int64_t pitches[3];                /* bytes from row to row */
} Image;

/* One of the two readers. */
typedef struct {
    Image *image;
    uint8_t *clean;        /* the tile's bytes */
    int64_t size;          /* of those */
    int row, column, left; /* next MCU, and how many are left in the tile */
    int held, unit;        /* MCUs read and not transformed; those that are being read */
    int places[UNIT][2];   /* rows and columns of the MCUs held */
    int previous[3];       /* first coefficients of the block before, by component */
    Reader in;
    int16_t blocks[UNIT * MAX_BLOCKS * BLOCK]
        __attribute__((aligned(64))); /* zeros between units */
} Stream;

/* Whether a tile of MCUs from `first` to `end` has one in the area. */
static int touches_area(const Image *image, int first, int end) {
    int row = first / image->per_row, last = (end - 1) / image->per_row,
        column = first % image->per_row;
    if (last < image->area[0] || row >= image->area[1]) return 0;
    return row != last || (column < image->area[3] && column + end - first > image->area[2]);
}

/* Let the stream begin with an image's next tile that has MCUs in the area. Returns whether there
 * is one. */
static int take_tile(Stream *stream, Image *image) {
    while (!image->is_damaged && image->next_tile < image->tiles) {
        int tile = image->next_tile++, first = tile * image->tile_mcus;
        int end = first + image->tile_mcus < image->mcus ? first + image->tile_mcus : image->mcus;
        if (!touches_area(image, first, end)) continue;
        const uint8_t *from = image->data + image->places[tile], *marker;
        stream->size = unstuff(from, image->data + image->size, stream->clean, &marker);
        stream->image = image, stream->left = end - first;
        stream->row = first / image->per_row, stream->column = first % image->per_row;
        stream->in = (Reader){stream->clean, 0, 0};
        memset(stream->previous, 0, sizeof stream->previous);
        if (stream->size >= 0 && (image->tiles > 1 || *marker == 0xD9)) return 1;
        image->is_damaged = 1;
    }
    return 0;
}

/* Transform one component of the MCUs held, as far as they lie in the area, and clear its blocks.
 */
static void transform_component(Stream *stream, int part) {
    Image *image = stream->image;
    const int *area = image->area;
    int across = image->header.across[part], down = image->header.down[part], n = 0;
    int16_t *blocks[UNIT * MAX_BLOCKS + QUARTERS];
    uint8_t *to[UNIT * MAX_BLOCKS + QUARTERS];
    for (int m = 0; m < stream->held; m++) {
        int row = stream->places[m][0], column = stream->places[m][1];
        int16_t *block = stream->blocks + BLOCK * (m * image->blocks + image->first_block[part]);
        int is_beside = row < area[0] || row >= area[1] || column < area[2] || column >= area[3];
        if (is_beside || image->is_damaged) {
            memset(block, 0, sizeof(int16_t) * BLOCK * across * down);
            continue;
        }
        uint8_t *corner = image->planes[part] + 8 * across * (column - area[2]);
        corner += 8 * down * (row - area[0]) * image->pitches[part];
        for (int y = 0; y < down; y++, corner += 8 * image->pitches[part])
            for (int x = 0; x < across; x++, block += BLOCK)
                blocks[n] = block, to[n++] = corner + 8 * x;
    }
    for (int i = 0; i < n; i += QUARTERS) {
        for (int q = n; q < i + QUARTERS; q++) /* quarters without a block do another one's again */
            blocks[q] = blocks[i], to[q] = to[i];
        image->beyond |=
            transform_blocks(blocks + i, image->steps[part], to + i, image->pitches[part]);
    }
}

static void finish_unit(Stream *stream) {
    for (int c = 0; c < stream->image->header.parts; c++) transform_component(stream, c);
    stream->held = 0;
}

/* The MCUs that have been read wait to be transformed. */
static void hold_unit(Stream *stream) {
    for (; stream->unit; stream->unit--) {
        int *place = stream->places[stream->held++];
        place[0] = stream->row, place[1] = stream->column;
        if (++stream->column == stream->image->per_row) stream->column = 0, stream->row++;
    }
}

/* What follows the MCUs that have been read: more of the same tile, or another one. left: blocks of
 * the unit that were not read, -1 for a damaged one. Returns blocks to read, 0: none is left. */
APART int next_unit(Stream *stream, Image *images, int count, int left) {
    Image *image = stream->image;
    if (image && stream->unit) {
        int64_t used = 8 * (stream->in.at - stream->clean) - stream->in.count,
                bits = 8 * stream->size;
        stream->left -= stream->unit;
        int is_sound = !left && used <= bits && (stream->left || used > bits - 8);
        image->is_damaged |= !is_sound;
        hold_unit(stream);
        if (stream->held == UNIT || image->is_damaged) finish_unit(stream);
        if (image->is_damaged) stream->left = 0;
        int next = stream->row * image->per_row + stream->column;
        if (image->tiles == 1 && next >= image->end) stream->left = 0;
    }
    if (!stream->left && !(image && take_tile(stream, image))) {
        if (stream->held) finish_unit(stream);
        for (int i = 0; i < count && !stream->left; i++) take_tile(stream, images + i);
        if (!stream->left) return 0;
    }
    stream->unit = stream->left < UNIT - stream->held ? stream->left : UNIT - stream->held;
    return stream->unit * stream->image->blocks;
}

/* What the inner loop keeps in registers. */
typedef struct {
    Reader in;
    uint32_t k;           /* number of the last coefficient */
    int left;             /* blocks of the unit, this one included; -1: damaged */
    int16_t *values;      /* this block */
    const uint32_t *look; /* its table */
    const BlockPlan *plan;
} Cursor;

/* A block's first coefficient. Returns whether there is a code for it. */
INLINE int begin_block(Cursor *cursor, int *previous) {
    int value = previous[cursor->plan->part];
    int is_sound = read_first(&cursor->in, cursor->plan->first, &value);
    previous[cursor->plan->part] = value;
    cursor->values[0] = (int16_t)value;
    cursor->look = cursor->plan->others->look, cursor->k = 0;
    return is_sound;
}

/* What step() left with k > 62. Returns whether there is more to read in this unit. */
INLINE int end_block(Cursor *cursor, uint32_t entry, int *previous) {
    int is_sound =
        finish_step(&cursor->in, cursor->plan->others, ZIGZAG, cursor->values, &cursor->k, entry);
    if (is_sound && cursor->k < 63) return 1;
    if (is_sound && --cursor->left == 0) return 0;
    cursor->values += BLOCK, cursor->plan++;
    if (is_sound && begin_block(cursor, previous)) return 1;
    cursor->left = -1;
    return 0;
}

/* The begin of the next unit; left: 0 where there is none. By value: what has an address does not
 * stay in registers. */
APART Cursor next_cursor(Stream *stream, Cursor cursor, Image *images, int count) {
    do {
        stream->in = cursor.in;
        cursor.left = next_unit(stream, images, count, cursor.left);
        if (!cursor.left) break;
        cursor.in = stream->in, cursor.plan = stream->image->plan;
        cursor.values = stream->blocks + BLOCK * stream->image->blocks * stream->held;
        refill(&cursor.in);
        if (!begin_block(&cursor, stream->previous)) cursor.left = -1;
    } while (cursor.left < 0);
    return cursor;
}

INLINE int step_cursor(Cursor *cursor, int *previous) {
    uint32_t entry = step(&cursor->in, cursor->look, ZIGZAG, cursor->values, &cursor->k);
    return !RARE(cursor->k > 62) || end_block(cursor, entry, previous);
}

/* One step; after the last one of a unit the bits must be refilled. */
#define STEP(cursor, stream)                                                                       \
    if (RARE(!step_cursor(&cursor, stream->previous))) {                                           \
        cursor = next_cursor(stream, cursor, images, count);                                       \
        break;                                                                                     \
    }

/* Read the tiles of `count` images (1 or 2) that lie under their crops, into their planes. */
static void read_images(Stream streams[2], Image *images, int count) {
    Stream *one = streams, *two = streams + 1;
    for (int i = 0; i < 2; i++)
        streams[i].image = NULL, streams[i].left = streams[i].held = streams[i].unit = 0;
    Cursor a = next_cursor(one, (Cursor){.left = 0}, images, count);
    Cursor b = next_cursor(two, (Cursor){.left = 0}, images, count);
    while (a.left && b.left) {
        refill(&a.in), refill(&b.in);
#pragma GCC unroll 4 /* four steps use 48 bits at most; three after a first coefficient, 46 */
        for (int i = 0; i < 4; i++) {
            STEP(a, one)
            STEP(b, two)
        }
    }
    if (b.left) a = b, one = two;
    while (a.left) {
        refill(&a.in);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) STEP(a, one)
    }
    const Int16s none = {0};
    for (int i = 0; i < count; i++)
        images[i].is_damaged |= memcmp(&images[i].beyond, &none, sizeof none) != 0;
}
