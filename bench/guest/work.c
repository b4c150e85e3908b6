/*
 * work: the workloads of the guest benchmark suite, as one static program.
 *
 *     work NAME [PASSES [LIMIT]]    runs PASSES passes (0: as many as the workload has), at least one, but begins no
 *                                   further one once LIMIT seconds have gone by; prints one line:
 *     work: NAME passes=N seconds=S least=L whole=W check=C
 *                                   S for all N passes, L for the quickest; W also for the preparation; C the
 *                                   checksum of a pass. A pass whose checksum differs from the first's is an error.
 *     work list                     prints each workload's kind, name and passes
 *
 * With WORK_CPUS=N in the environment it keeps to the first N processors that it may run on.
 *
 * The same file runs in the guests and on the bare host, so what is compared is the same instructions.
 */
#define _GNU_SOURCE
#include "work.h"

#include <errno.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <time.h>
#include <unistd.h>

const char *self;

static const struct {
    const char *kind;
    const struct workload *workloads;
} groups[] = {
    {"compute", integer_workloads}, {"compute", memory_workloads}, {"compute", vector_workloads},
    {"compute", tool_workloads},    {"system", system_workloads},
};

_Noreturn void fail(const char *what)
{
    fprintf(stderr, "work: %s: %s\n", what, strerror(errno));
    _exit(2);
}

uint64_t next_random(uint64_t *state)
{
    uint64_t z = *state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

uint64_t check(uint64_t sum, const void *data, size_t length)
{
    const uint8_t *bytes = data;
    for (; length >= 8; length -= 8, bytes += 8) {
        uint64_t word;
        memcpy(&word, bytes, 8);
        sum = (sum ^ word) * 0x100000001b3u;
        sum ^= sum >> 29;
    }
    for (; length > 0; length--)
        sum = (sum ^ *bytes++) * 0x100000001b3u;
    return sum;
}

void fill_text(char *to, size_t length)
{
    enum { WORDS = 1024, LONGEST = 12 };
    static char words[WORDS][LONGEST + 1];
    uint64_t random = 7;
    for (int i = 0; i < WORDS; i++) {
        size_t letters = 2 + next_random(&random) % (LONGEST - 2);
        for (size_t j = 0; j < letters; j++)
            words[i][j] = (char)('a' + next_random(&random) % 26);
        words[i][letters] = ' ';
    }
    size_t at = 0;
    while (at < length) {
        /* The product of two fractions: small numbers are the frequent ones. */
        uint64_t r = next_random(&random);
        const char *word = words[((r & 0xffff) * ((r >> 16) & 0xffff)) >> 22];
        while (at < length) {
            char letter = *word++;
            to[at++] = letter;
            if (letter == ' ')
                break;
        }
    }
}

static double now(void)
{
    struct timespec time;
    if (clock_gettime(CLOCK_MONOTONIC, &time) != 0)
        fail("clock_gettime");
    return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

static void keep_to_processors(const char *text)
{
    cpu_set_t all, some;
    int wanted = atoi(text);
    if (sched_getaffinity(0, sizeof all, &all) != 0)
        fail("sched_getaffinity");
    CPU_ZERO(&some);
    for (int cpu = 0; cpu < CPU_SETSIZE && CPU_COUNT(&some) < wanted; cpu++)
        if (CPU_ISSET(cpu, &all))
            CPU_SET(cpu, &some);
    if (sched_setaffinity(0, sizeof some, &some) != 0)
        fail("sched_setaffinity");
}

static int run(const struct workload *workload, unsigned passes, double limit)
{
    double begun = now();
    if (workload->prepare)
        workload->prepare();
    double started = now(), before = started, least = 1e9;
    uint64_t sum = 0;
    unsigned done = 0;
    do {
        uint64_t this_sum = workload->pass();
        double after = now();
        if (after - before < least)
            least = after - before;
        before = after;
        if (done++ == 0)
            sum = this_sum;
        if (this_sum != sum) {
            printf("work: %s wrong: pass %u gave %016llx, not %016llx\n", workload->name, done,
                   (unsigned long long)this_sum, (unsigned long long)sum);
            return 1;
        }
    } while (done < passes && before - started < limit);
    printf("work: %s passes=%u seconds=%.6f least=%.6f whole=%.6f check=%016llx\n", workload->name, done,
           before - started, least, before - begun, (unsigned long long)sum);
    return 0;
}

int main(int argc, char **argv)
{
    self = (const char *)getauxval(AT_EXECFN);
    /* What the workload that starts programs starts. */
    if (argc == 2 && strcmp(argv[1], "nothing") == 0)
        return 0;
    const char *cpus = getenv("WORK_CPUS");
    if (cpus)
        keep_to_processors(cpus);
    if (argc >= 2) {
        for (size_t i = 0; i < sizeof groups / sizeof *groups; i++) {
            for (const struct workload *w = groups[i].workloads; w->name; w++) {
                if (strcmp(argv[1], "list") == 0) {
                    printf("%s %s %u\n", groups[i].kind, w->name, w->passes);
                } else if (strcmp(argv[1], w->name) == 0) {
                    unsigned passes = argc > 2 ? (unsigned)strtoul(argv[2], NULL, 10) : 0;
                    return run(w, passes ? passes : w->passes, argc > 3 ? strtod(argv[3], NULL) : 1e9);
                }
            }
        }
        if (strcmp(argv[1], "list") == 0)
            return 0;
    }
    fprintf(stderr, "usage: work list | work NAME [PASSES [LIMIT]]\n");
    return 2;
}
