/*
 * Writes that must survive a loss of power, and what is found of them afterwards.
 *
 *   powercut write DIRECTORY DEVICE   several threads write numbered records for ever: to files in the directory, each made stable
 *                                     with fsync(2), and to a region each of the device, past the cache, with O_DSYNC. As soon
 *                                     as a record is stable, "stable WRITER NUMBER" is printed; on a serial console, that is
 *                                     before the next one.
 *   powercut check DIRECTORY DEVICE   prints "found WRITER NUMBER" for each: the newest record before which none is missing.
 *
 * A writer has SLOTS places and goes round them, so that records are overwritten too. While record N is written, all older ones are
 * stable; only the place of N may hold anything else than a whole record.
 */
#include "proof.h"

#include <fcntl.h>
#include <pthread.h>

enum { FILES = 2, REGIONS = 2, WRITERS = FILES + REGIONS, SLOTS = 61, RECORD = 8192 };

struct record {
    uint64_t writer, number;
    uint32_t words[RECORD / 4 - 4];
};

static const char *directory, *device;
static pthread_mutex_t console = PTHREAD_MUTEX_INITIALIZER;

static void fill(struct record *record, uint64_t writer, uint64_t number)
{
    uint64_t state = number * 0x9e3779b97f4a7c15 + writer;
    record->writer = writer;
    record->number = number;
    for (size_t i = 0; i < sizeof record->words / sizeof *record->words; i++) {
        state = state * 6364136223846793005 + 1442695040888963407;
        record->words[i] = (uint32_t)(state >> 32);
    }
}

static int open_writer(unsigned writer, int flags)
{
    char path[256];
    if (writer >= FILES) return open(device, flags | O_DIRECT | O_DSYNC);
    snprintf(path, sizeof path, "%s/records%u", directory, writer);
    return open(path, flags | O_CREAT, 0600);
}

static off_t place(unsigned writer, uint64_t number)
{
    uint64_t first = writer < FILES ? 0 : (uint64_t)(writer - FILES) * SLOTS;
    return (off_t)((first + number % SLOTS) * RECORD);
}

static struct record *new_record(void)
{
    struct record *record = aligned_alloc(PAGE, sizeof *record);
    NEED(record != NULL);
    return record;
}

/* Reads a record; its number, or 0 if there is no whole one. */
static uint64_t read_record(int file, unsigned writer, uint64_t slot, struct record *found, struct record *expected)
{
    memset(found, 0, sizeof *found);
    if (pread(file, found, sizeof *found, place(writer, slot)) != sizeof *found) return 0;
    fill(expected, writer, found->number);
    return memcmp(found, expected, sizeof *found) == 0 && found->number % SLOTS == slot ? found->number : 0;
}

/* The newest record of a writer before which none is missing; 0 if there is none. */
static uint64_t newest(unsigned writer, bool say)
{
    struct record *found = new_record(), *expected = new_record();
    uint64_t numbers[SLOTS], most = 0;
    int file = open_writer(writer, O_RDWR);
    NEED(file >= 0);
    for (uint64_t slot = 0; slot < SLOTS; slot++) {
        numbers[slot] = read_record(file, writer, slot, found, expected);
        if (numbers[slot] > most) most = numbers[slot];
    }
    close(file);
    /* The place after the newest may hold what was being written; all the others their record. */
    unsigned missing = 0;
    for (uint64_t back = 0; back + 1 < SLOTS && back < most; back++) {
        uint64_t number = most - back;
        if (numbers[number % SLOTS] != number) {
            if (say) printf("writer %u: record %llu is not there\n", writer, (unsigned long long)number);
            missing++;
        }
    }
    free(found);
    free(expected);
    return missing ? 0 : most;
}

static void *write_for_ever(void *argument)
{
    unsigned writer = (unsigned)(uintptr_t)argument;
    uint64_t number = newest(writer, false);
    struct record *record = new_record();
    int file = open_writer(writer, O_RDWR);
    NEED(file >= 0);
    for (;;) {
        fill(record, writer, ++number);
        NEED(pwrite(file, record, sizeof *record, place(writer, number)) == sizeof *record);
        if (writer < FILES) NEED(fsync(file) == 0);
        pthread_mutex_lock(&console);
        printf("stable %u %llu\n", writer, (unsigned long long)number);
        pthread_mutex_unlock(&console);
    }
    return NULL;
}

int main(int argc, char **argv)
{
    proof_name = "powercut";
    setvbuf(stdout, NULL, _IOLBF, 0);
    if (argc != 4) {
        printf("usage: powercut write|check DIRECTORY DEVICE\n");
        return 2;
    }
    directory = argv[2];
    device = argv[3];
    if (strcmp(argv[1], "check") == 0) {
        for (unsigned writer = 0; writer < WRITERS; writer++)
            printf("found %u %llu\n", writer, (unsigned long long)newest(writer, true));
        return 0;
    }
    pthread_t threads[WRITERS];
    for (uintptr_t writer = 0; writer < WRITERS; writer++)
        NEED(pthread_create(&threads[writer], NULL, write_for_ever, (void *)writer) == 0);
    pthread_join(threads[0], NULL);
    return 1;
}
