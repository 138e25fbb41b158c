/* Feeds files from standard input (8 bytes of size, then the file, ...) to the writer's C code, in
 * blocks of memory that end where they must: tests/native/test_recode.py compiles it with sanitizers.
 * Prints how many files were read, kept and shrunk.
 */
#include <stdio.h>

#include "recode.c"

static int try(const Header *header, const uint8_t *data, int64_t size, int width, int height) {
    uint8_t steps[128];
    int64_t room = 1 << 20, need = memory_bytes(header, width, height, size);
    memset(steps, 3, sizeof steps);
    Memory *memory = calloc(need, 1);
    uint8_t *out = malloc(room);
    int64_t made = write_anew(header, data, size, width, height, 2, steps, memory, out, room);
    /* once more with what is left in the memory, and little room: refused, or the same */
    int64_t again = write_anew(header, data, size, width, height, 2, steps, memory, out, 1 << 13);
    if (again != made && again != NO_ROOM) abort();
    free(memory), free(out);
    return made > 0;
}

int main(void) {
    int64_t size;
    int read = 0, kept = 0, shrunk = 0;
    for (; fread(&size, 8, 1, stdin) == 1; read++) {
        uint8_t *data = malloc(size);
        Header header;
        if (fread(data, 1, size, stdin) != (size_t)size) return 1;
        if (read_header(data, size, &header) && header.width * header.height < 1 << 20) {
            int width = header.width, height = header.height;
            kept += try(&header, data, size, width, height);
            shrunk += try(&header, data, size, (width + 2) / 3, (height + 1) / 2);
            try(&header, data, size, 1, 1);
        }
        free(data);
    }
    printf("%d %d %d\n", read, kept, shrunk);
    return 0;
}
