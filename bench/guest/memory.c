/*
 * Memory workloads: what the time goes into is loads and stores.
 */
#include "work.h"

#include <stdlib.h>
#include <string.h>

static void *get(size_t size)
{
    void *memory = malloc(size);
    if (!memory)
        fail("malloc");
    return memory;
}

/* ---- random: each load says where the next is, all over 16 MiB; and stores at random places ---- */

enum { CELLS = (16 << 20) / 8 };
static uint64_t *cells, *marks;

static void random_prepare(void)
{
    /* Sattolo's shuffle: one cycle through all cells. */
    uint64_t random = 4;
    cells = get(CELLS * sizeof *cells);
    marks = get(CELLS * sizeof *marks);
    memset(marks, 0, CELLS * sizeof *marks);
    for (uint64_t i = 0; i < CELLS; i++)
        cells[i] = i;
    for (uint64_t i = CELLS - 1; i > 0; i--) {
        uint64_t j = next_random(&random) % i, swap = cells[i];
        cells[i] = cells[j];
        cells[j] = swap;
    }
}

static uint64_t random_pass(void)
{
    uint64_t at = 0, sum = 0, random = 5;
    for (int i = 0; i < 80000; i++) {
        at = cells[at];
        sum = sum * 3 + at;
    }
    for (int i = 0; i < 150000; i++) {
        uint64_t *mark = &marks[next_random(&random) % CELLS];
        *mark = *mark * 5 + (uint64_t)i;
        sum ^= *mark;
    }
    /* As it was, so that the next pass finds the same. */
    random = 5;
    for (int i = 0; i < 150000; i++)
        marks[next_random(&random) % CELLS] = 0;
    return sum;
}

/* ---- copy: the library's memcpy, memmove and memset, large and small ---- */

enum { COPIED = 1 << 20 };
static char *from, *to;

static void copy_prepare(void)
{
    from = get(COPIED);
    to = get(COPIED);
    fill_text(from, COPIED);
    memset(to, 0, COPIED);
}

static uint64_t copy_pass(void)
{
    uint64_t sum = CHECK_START, random = 6;
    for (int i = 0; i < 60; i++) {
        size_t skew = (size_t)i;
        memset(to, i, COPIED / 4);
        memcpy(to + skew, from, COPIED - 64);
        memmove(to + 33, to, COPIED / 2);
        sum = check(sum, to + skew * 1024, 64);
    }
    for (int i = 0; i < 100000; i++) {
        uint64_t r = next_random(&random);
        memcpy(to + (r & 0xffff), from + (r >> 16 & 0xffff), 1 + (r >> 32 & 127));
    }
    return check(sum, to, 4096);
}

/* ---- scan: memchr, strlen and memcmp of the library, and bytes counted one by one ---- */

enum { SCANNED = 1 << 20 };
static char *text, *other;

static void scan_prepare(void)
{
    text = get(SCANNED);
    other = get(SCANNED);
    fill_text(text, SCANNED);
    text[SCANNED - 1] = 0;
    memcpy(other, text, SCANNED);
}

static uint64_t scan_pass(void)
{
    uint64_t sum = 0;
    for (int i = 0; i < 150; i++) {
        const char *found = memchr(text + i, 0, (size_t)(SCANNED - i));
        sum = sum * 3 + (uint64_t)(found - text);
        sum += strlen(text + i);
        sum += (uint64_t)memcmp(text + i, other + i, (size_t)(SCANNED - i));
    }
    /* Words by the spaces between them. */
    for (const char *at = text; (at = memchr(at, ' ', (size_t)(text + SCANNED - at))); at++)
        sum++;
    const volatile char *letters = text;
    for (int i = 0; i < SCANNED; i++)
        sum += letters[i] == 'e';
    return sum;
}

const struct workload memory_workloads[] = {
    {"random", 8, random_pass, random_prepare},
    {"copy", 8, copy_pass, copy_prepare},
    {"scan", 8, scan_pass, scan_prepare},
    {0},
};
