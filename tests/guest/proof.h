/*
 * What the proof programs share: expectations, and rounds for as long as was asked for.
 *
 * Each program is one file, runs in 64-bit and in 32-bit form, takes as its argument for how many seconds to repeat
 * everything (once is the least), and ends with the line "NAME: passed, N rounds" and status 0, or with what was wrong
 * and status 1. They hold on a bare host as well, which is how they are tried.
 */
#ifndef PROOF_H
#define PROOF_H

#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

enum { PAGE = 4096 };

#ifdef __x86_64__
#define REGISTER_IP REG_RIP
#define REGISTER_AX REG_RAX
#define REGISTER_CX REG_RCX
#define REGISTER_SI REG_RSI
#define REGISTER_DI REG_RDI
#define BITS "64"
#else
#define REGISTER_IP REG_EIP
#define REGISTER_AX REG_EAX
#define REGISTER_CX REG_ECX
#define REGISTER_SI REG_ESI
#define REGISTER_DI REG_EDI
#define BITS "32"
#endif

static const char *proof_name;

/* Ends the program unless the condition holds. The rest is printf's and says what was found. */
#define EXPECT(condition, ...)                                                                                         \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            printf("%s: failed at %s:%d: not %s: ", proof_name, __FILE__, __LINE__, #condition);                       \
            printf(__VA_ARGS__);                                                                                       \
            printf("\n");                                                                                              \
            fflush(stdout);                                                                                            \
            _exit(1);                                                                                                  \
        }                                                                                                              \
    } while (0)

/* For calls that fail only if the test itself cannot run. */
#define NEED(condition) EXPECT(condition, "%s", strerror(errno))

static inline double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

/* Runs everything again and again until the time is up. */
static inline int prove(const char *name, int argc, char **argv, void (*everything)(unsigned round))
{
    double limit = argc > 1 ? strtod(argv[1], NULL) : 0, started = now();
    unsigned rounds = 0;
    proof_name = name;
    setvbuf(stdout, NULL, _IOLBF, 0);
    do
        everything(rounds++);
    while (now() - started < limit);
    printf("%s: passed, %u rounds, %s bits\n", name, rounds, BITS);
    return 0;
}

/* Memory with all rights, at an address of the system's choice. */
static inline uint8_t *pages(size_t count)
{
    uint8_t *memory =
        mmap(NULL, count * PAGE, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    NEED(memory != MAP_FAILED);
    return memory;
}

/* Machine code is written with these; each returns where the next instruction goes. */
static inline uint8_t *put(uint8_t *at, const void *bytes, size_t length)
{
    memcpy(at, bytes, length);
    return at + length;
}

#define PUT(at, ...) put(at, (const uint8_t[]){__VA_ARGS__}, sizeof((const uint8_t[]){__VA_ARGS__}))

static inline uint8_t *put32(uint8_t *at, uint32_t number) { return put(at, &number, 4); }

/* mov eax, NUMBER */
static inline uint8_t *put_mov_eax(uint8_t *at, uint32_t number) { return put32(PUT(at, 0xb8), number); }

/* ret */
static inline uint8_t *put_ret(uint8_t *at) { return PUT(at, 0xc3); }

/* What follows an opcode and its ModRM byte (made for [rip+disp32], or [disp32] in 32-bit code), so that the operand is
   at `target`; the instruction has `rest` bytes more. */
static inline uint8_t *put_address(uint8_t *at, const uint8_t *target, int rest)
{
#ifdef __x86_64__
    return put32(at, (uint32_t)(target - (at + 4 + rest)));
#else
    (void)rest;
    return put32(at, (uint32_t)target);
#endif
}

static inline uint32_t call(const uint8_t *code)
{
    uint32_t (*function)(void);
    memcpy(&function, &code, sizeof code);
    return function();
}

/* An instruction that serialises: what was written to code by another way than this address holds after it. */
static inline void serialise(void)
{
    uint32_t a = 0, b, c = 0, d;
    __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d) : : "memory");
}

static inline void handle(int number, void (*handler)(int, siginfo_t *, void *))
{
    struct sigaction action = {.sa_sigaction = handler, .sa_flags = SA_SIGINFO};
    NEED(sigaction(number, &action, NULL) == 0);
}

#endif
