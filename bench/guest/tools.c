/*
 * Workloads that are Debian's own programs: a compressor, a cipher, interpreters, a compiler. Each pass starts the
 * program and reads what it prints to the end. And one that is two threads of ours.
 */
#define _GNU_SOURCE
#include "work.h"

#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

/* The programs' input, made by prepare functions. */
#define TEXT "/tmp/work.text"
#define DATA "/usr/lib/work"

static void write_text(size_t length)
{
    static char text[4 << 20];
    fill_text(text, length);
    int fd = open(TEXT, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    if (fd < 0 || write(fd, text, length) != (ssize_t)length || close(fd) != 0)
        fail(TEXT);
}

/* Reads to the end of a file. */
static uint64_t check_file(int fd)
{
    static char buffer[64 << 10];
    uint64_t sum = CHECK_START;
    ssize_t count;
    while ((count = read(fd, buffer, sizeof buffer)) > 0)
        sum = check(sum, buffer, (size_t)count);
    if (count < 0)
        fail("read");
    return sum;
}

/* Runs a program; the checksum is of its standard output. */
static uint64_t run_program(const char *const *arguments)
{
    int ends[2], status;
    if (pipe2(ends, O_CLOEXEC) != 0)
        fail("pipe");
    pid_t child = fork();
    if (child < 0)
        fail("fork");
    if (child == 0) {
        dup2(ends[1], 1);
        execv(arguments[0], (char *const *)arguments);
        fail(arguments[0]);
    }
    close(ends[1]);
    uint64_t sum = check_file(ends[0]);
    close(ends[0]);
    if (waitpid(child, &status, 0) != child || status != 0) {
        fprintf(stderr, "work: %s ended with status %#x\n", arguments[0], status);
        _exit(2);
    }
    return sum;
}

#define RUN(...) run_program((const char *const[]){__VA_ARGS__, NULL})

static void half_megabyte(void) { write_text(512 << 10); }
static void two_megabytes(void) { write_text(2 << 20); }
static void four_megabytes(void) { write_text(4 << 20); }

static uint64_t xz_pass(void) { return RUN("/usr/bin/xz", "-2", "-T1", "-c", TEXT); }
static uint64_t zstd_pass(void) { return RUN("/usr/bin/zstd", "-q", "-6", "--single-thread", "-c", TEXT); }
static uint64_t gzip_pass(void) { return RUN("/usr/bin/gzip", "-n", "-3", "-c", TEXT); }

static uint64_t openssl_pass(void)
{
    return RUN("/usr/bin/openssl", "enc", "-aes-128-cbc", "-nosalt", "-K", "00112233445566778899aabbccddeeff", "-iv",
               "0123456789abcdef0123456789abcdef", "-in", TEXT);
}

static uint64_t python_pass(void) { return RUN("/usr/bin/python3", "-I", "-S", "-B", DATA "/work.py"); }
static uint64_t perl_pass(void) { return RUN("/usr/bin/perl", DATA "/work.pl"); }
static uint64_t luajit_pass(void) { return RUN("/usr/bin/luajit", DATA "/work.lua"); }

static uint64_t compiler_pass(void)
{
    static const char object[] = "/tmp/work.o";
    RUN("/usr/bin/gcc", "-O2", "-c", DATA "/source.c", "-o", object);
    int fd = open(object, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        fail(object);
    uint64_t sum = check_file(fd);
    close(fd);
    return sum;
}

/* ---- parallel: two threads, each with work of its own ---- */

static uint8_t parallel_data[2][512 << 10], parallel_digest[2][32];

static void parallel_prepare(void)
{
    fill_text((char *)parallel_data, sizeof parallel_data);
}

static void *hash_one(void *number)
{
    size_t n = (size_t)number;
    for (int i = 0; i < 3; i++)
        sha256(parallel_data[n], sizeof *parallel_data, parallel_digest[n]);
    return NULL;
}

static uint64_t parallel_pass(void)
{
    pthread_t other;
    if (pthread_create(&other, NULL, hash_one, (void *)1) != 0)
        fail("pthread_create");
    hash_one((void *)0);
    if (pthread_join(other, NULL) != 0)
        fail("pthread_join");
    return check(CHECK_START, parallel_digest, sizeof parallel_digest);
}

const struct workload tool_workloads[] = {
    {"parallel", 8, parallel_pass, parallel_prepare},
    {"xz", 2, xz_pass, half_megabyte},
    {"zstd", 3, zstd_pass, two_megabytes},
    {"gzip", 3, gzip_pass, two_megabytes},
    {"openssl", 5, openssl_pass, four_megabytes},
    {"python", 3, python_pass, NULL},
    {"perl", 3, perl_pass, NULL},
    {"luajit", 2, luajit_pass, NULL},
    {"compiler", 1, compiler_pass, NULL},
    {0},
};
