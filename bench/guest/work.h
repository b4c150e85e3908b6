/*
 * What the workloads share; see work.c.
 */
#ifndef WORK_H
#define WORK_H

#include <stddef.h>
#include <stdint.h>

/* A workload: `pass` does a fixed amount of work and returns a checksum of its result, the same each time. */
struct workload {
    const char *name;
    /* How many passes make the whole workload: about a tenth of a second on a processor of today. */
    unsigned passes;
    uint64_t (*pass)(void);
    /* What is done once before, and not timed; may be NULL. */
    void (*prepare)(void);
};

/* Each ends with an entry without a name. */
extern const struct workload integer_workloads[], memory_workloads[], vector_workloads[], tool_workloads[],
    system_workloads[];

/* Says what failed, with errno's words, and ends the program with status 2. */
_Noreturn void fail(const char *what);

/* The next of a fixed series of numbers that look random (splitmix64). */
uint64_t next_random(uint64_t *state);

/* A checksum over bytes (FNV-1a's idea, eight at a time), going on from `sum`; CHECK_START begins. */
#define CHECK_START 0xcbf29ce484222325u
uint64_t check(uint64_t sum, const void *data, size_t length);

/* Fills memory with text-like data: words of a small vocabulary, the frequent ones often. */
void fill_text(char *to, size_t length);

/* SHA-256 as in FIPS 180-4, in plain C. */
void sha256(const uint8_t *data, size_t length, uint8_t digest[32]);

/* The program's own file, to be executed again. */
extern const char *self;

#endif
