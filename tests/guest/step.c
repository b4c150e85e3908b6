/*
 * step: a program that single-steps itself. It sets the trap flag, and a SIGTRAP handler notes where each step ends and
 * what is in a register there.
 */
#include "proof.h"

#include <sys/syscall.h>

enum { MOST = 4096 };
static struct { uintptr_t ip, ax; } steps[MOST];
static volatile unsigned count;

static void on_trap(int number, siginfo_t *info, void *context)
{
    (void)number;
    const greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    EXPECT(info->si_code == TRAP_TRACE || info->si_code == TRAP_BRKPT || info->si_code == SI_KERNEL, "code %d", info->si_code);
    if (count < MOST) {
        steps[count].ip = (uintptr_t)registers[REGISTER_IP];
        steps[count].ax = (uintptr_t)registers[REGISTER_AX];
    }
    count++;
}

#ifdef __x86_64__
#define AX "%%rax"
#define CX "%%rcx"
#define SI "%%rsi"
#define DI "%%rdi"
#define SP "%%rsp"
#define PUSHF "pushfq\n"
#define POPF "popfq\n"
#define ADDRESS(label, to) "lea " label "(%%rip), " to "\n"
#define SPARE "sub $128, %%rsp\n"
#define UNSPARE "add $128, %%rsp\n"
#else
#define AX "%%eax"
#define CX "%%ecx"
#define SI "%%esi"
#define DI "%%edi"
#define SP "%%esp"
#define PUSHF "pushfl\n"
#define POPF "popfl\n"
#define ADDRESS(label, to) "mov $" label ", " to "\n"
#define SPARE ""
#define UNSPARE ""
#endif

#define SET_TF PUSHF "orl $0x100, (" SP ")\n" POPF
#define CLEAR_TF PUSHF "andl $~0x100, (" SP ")\n" POPF

/* The code that is stepped. The numbered labels are where steps are expected to end; s00 is the first instruction after
   TF is set, whose own step ends at s01. */
extern const char s01[], s02[], s03[], s04[], s05[], s06[], s07[], s08[], s09[], s10[], s11[], s12[], s13[], s14[], s15[], s16[], s17[];

__attribute__((noinline)) static void stepped(bool trap)
{
    static uint8_t source[16] = "single-stepping", target[16];
    uintptr_t from = (uintptr_t)source, to = (uintptr_t)target;
    __asm__ volatile(
        SPARE
        "test %b2, %b2\n"
        "jz 1f\n"
        SET_TF
        "1:\n"
        "mov $7, %%eax\n"                    /* the first that is stepped */
        "s01: add $5, %%eax\n"
        "s02: push " AX "\n"
        "s03: mov $0, %%eax\n"
        "s04: pop " AX "\n"
        "s05: cmp $12, %%eax\n"
        "s06: jne s07\n"                     /* not taken */
        "s17: call s09\n"
        "s07: lea 1(" AX "), %%eax\n"
        "s08: jmp s11\n"
        "s09: xor $0x40, %%eax\n"
        "s10: ret\n"
        "ud2\n"
        "s11: mov $3, %%ecx\n"
        "s12: cld\n"
        "s13: rep movsb\n"                   /* a step for each turn, then on */
        "s14: nop\n"
        "s15: dec %%eax\n"
        "s16:\n"
        CLEAR_TF
        UNSPARE
        : "+S"(from), "+D"(to)
        : "d"(trap)
        : "ax", "cx", "memory", "cc");
    EXPECT(memcmp(target, "sin", 3) == 0, "the copy is %.3s", (const char *)target);
    target[0] = 0;
}

static void known_steps(void)
{
    const struct { const char *ip; uintptr_t ax; } expected[] = {
        {s01, 7}, {s02, 12}, {s03, 12}, {s04, 0}, {s05, 12}, {s06, 12}, {s17, 12}, {s09, 12}, {s10, 76}, {s07, 76},
        {s08, 77}, {s11, 77}, {s12, 77}, {s13, 77}, {s13, 77}, {s13, 77}, {s14, 77}, {s15, 77}, {s16, 76},
    };
    enum { EXPECTED = sizeof expected / sizeof *expected };
    /* Often without, then with: what was translated for speed has to be stepped all the same. */
    for (int i = 0; i < 500; i++)
        stepped(false);
    EXPECT(count == 0, "%u steps without the flag", count);
    for (int round = 0; round < 20; round++) {
        count = 0;
        stepped(true);
        /* After the last expected there are those that clear the flag: three. */
        EXPECT(count == EXPECTED + 3, "%u steps", count);
        for (unsigned i = 0; i < EXPECTED; i++)
            EXPECT(steps[i].ip == (uintptr_t)expected[i].ip && steps[i].ax == expected[i].ax,
                   "step %u ends at %zx with %zx instead of %zx with %zx", i, (size_t)steps[i].ip, (size_t)steps[i].ax,
                   (size_t)expected[i].ip, (size_t)expected[i].ax);
        stepped(false);
        EXPECT(count == EXPECTED + 3, "steps after the flag is cleared");
    }
    count = 0;
}

/* The handler itself must not be stepped, nor the kernel. The trap after a system call belongs to the instruction that
   follows it: the return sets the flag again. (Some processors also trap at once.) */
extern const char c01[], c02[];

static void system_call_steps(void)
{
    for (int round = 0; round < 20; round++) {
        uintptr_t result = SYS_getpid;
        count = 0;
#ifdef __x86_64__
        __asm__ volatile(SPARE SET_TF "syscall\n c01: nop\n c02:\n" CLEAR_TF UNSPARE : "+a"(result) : : "rcx", "r11", "memory", "cc");
#else
        __asm__ volatile(SET_TF "int $0x80\n c01: nop\n c02:\n" CLEAR_TF : "+a"(result) : : "memory", "cc");
#endif
        EXPECT(result == (uintptr_t)getpid(), "getpid says %zu", (size_t)result);
        unsigned at = 0;
        while (at < count && steps[at].ip == (uintptr_t)c01)
            at++;
        EXPECT(at <= 1, "%u steps at the system call's end", at);
        EXPECT(count == at + 4 && steps[at].ip == (uintptr_t)c02, "%u steps, then at %zx", count, (size_t)steps[at].ip);
    }
    count = 0;
}

/* A loop of known length in steps, with a store in it. */
static void loop_steps(void)
{
    enum { TURNS = 300 };
    uint32_t sum = 0;
    count = 0;
    __asm__ volatile(SPARE "mov %1, %%ecx\n" SET_TF "1: add %%ecx, %0\n dec %%ecx\n jnz 1b\n" CLEAR_TF UNSPARE
                     : "+r"(sum)
                     : "i"(TURNS)
                     : "ecx", "memory", "cc");
    EXPECT(sum == TURNS * (TURNS + 1) / 2, "the sum is %u", sum);
    EXPECT(count == 3 * TURNS + 3, "%u steps", count);
    count = 0;
}

/* INT3 traps without the flag. */
static void traps(void)
{
    for (unsigned i = 1; i <= 50; i++) {
        __asm__ volatile("int3");
        EXPECT(count == i, "%u traps by INT3", count);
    }
    count = 0;
}

static void everything(unsigned round)
{
    (void)round;
    handle(SIGTRAP, on_trap);
    known_steps();
    system_call_steps();
    loop_steps();
    traps();
}

int main(int argc, char **argv) { return prove("step", argc, argv, everything); }
