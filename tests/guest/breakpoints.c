/*
 * breakpoints: a parent that debugs its child by ptrace(2): the processor's debug registers (execution, writes, reads of
 * each length), INT3 written into code that runs, and single steps that are counted.
 */
#include "proof.h"

#include <sys/ptrace.h>
#include <sys/user.h>
#include <sys/wait.h>

/* What parent and child both see: how often the child did what, and what it touches. */
static volatile struct {
    uint64_t order[8];
    uint8_t bytes[64];
} *shared;

__attribute__((noinline)) static void work(uint32_t turns)
{
    for (uint32_t i = 0; i < turns; i++)
        shared->order[1] += i;
}

__attribute__((noinline)) static void target(void) { shared->order[2]++; }

/* Eight single instructions, to be stepped. */
extern const char run_start[], run_end[];
__attribute__((noinline)) static void run(void)
{
    __asm__ volatile("run_start: nop\n inc %%eax\n nop\n inc %%eax\n nop\n inc %%eax\n nop\n nop\n run_end:\n" : : : "eax", "cc");
}

/* Writes or reads `length` bytes at `at`. */
__attribute__((noinline)) static void touch(unsigned at, unsigned length, bool write)
{
    volatile uint8_t *bytes = shared->bytes + at;
    switch (length) {
    case 1:
        if (write) *bytes = 1; else (void)*bytes;
        break;
    case 2:
        if (write) *(volatile uint16_t *)bytes = 1; else (void)*(volatile uint16_t *)bytes;
        break;
    case 4:
        if (write) *(volatile uint32_t *)bytes = 1; else (void)*(volatile uint32_t *)bytes;
        break;
    default: {
        volatile uint64_t *wide = (volatile uint64_t *)bytes;
        if (write) *wide = 1; else (void)*wide;
    }
    }
}

static void child_main(void)
{
    NEED(ptrace(PTRACE_TRACEME, 0, NULL, NULL) == 0);
    raise(SIGSTOP);
    for (;;) {
        work(200);
        target();
        run();
        for (unsigned length = 1; length <= sizeof(long); length *= 2) {
            touch(16, length, true);
            touch(16, length, false);
            touch(32, length, true);
        }
        shared->order[3]++;
    }
}

static pid_t child;

static void set_debug(int number, uintptr_t value)
{
    NEED(ptrace(PTRACE_POKEUSER, child, offsetof(struct user, u_debugreg) + (size_t)number * sizeof(long), value) == 0);
}

static uintptr_t get_debug(int number)
{
    errno = 0;
    long value = ptrace(PTRACE_PEEKUSER, child, offsetof(struct user, u_debugreg) + (size_t)number * sizeof(long), NULL);
    NEED(errno == 0);
    return (uintptr_t)value;
}

static struct user_regs_struct registers(void)
{
    struct user_regs_struct all;
    NEED(ptrace(PTRACE_GETREGS, child, NULL, &all) == 0);
    return all;
}

#ifdef __x86_64__
static uintptr_t ip(void) { return registers().rip; }
static void set_ip(uintptr_t to)
{
    struct user_regs_struct all = registers();
    all.rip = to;
    NEED(ptrace(PTRACE_SETREGS, child, NULL, &all) == 0);
}
#else
static uintptr_t ip(void) { return (uintptr_t)registers().eip; }
static void set_ip(uintptr_t to)
{
    struct user_regs_struct all = registers();
    all.eip = (long)to;
    NEED(ptrace(PTRACE_SETREGS, child, NULL, &all) == 0);
}
#endif

/* Lets the child go on, by CONT or SINGLESTEP, until it stops by the signal. */
static void go_on(int how, int expected)
{
    int status;
    NEED(ptrace(how, child, NULL, NULL) == 0);
    NEED(waitpid(child, &status, 0) == child);
    EXPECT(WIFSTOPPED(status) && WSTOPSIG(status) == expected, "the child has status %#x", status);
}

/* DR7's bits for one of the four: its type (0 execution, 1 writing, 3 both) and length. */
static uintptr_t control(int number, unsigned type, unsigned length)
{
    unsigned code = length == 1 ? 0 : length == 2 ? 1 : length == 4 ? 3 : 2;
    return (uintptr_t)1 << (2 * number) | (uintptr_t)(type | code << 2) << (16 + 4 * number);
}

static void execution(void)
{
    set_debug(0, (uintptr_t)target);
    set_debug(7, control(0, 0, 1));
    uint64_t before = shared->order[2];
    for (unsigned i = 0; i < 30; i++) {
        go_on(PTRACE_CONT, SIGTRAP);
        EXPECT(ip() == (uintptr_t)target, "stopped at %zx", (size_t)ip());
        EXPECT(get_debug(6) & 1, "DR6 is %zx", (size_t)get_debug(6));
        EXPECT(shared->order[2] == before + i, "stopped before it is executed: %u", (unsigned)(shared->order[2] - before));
        /* The flag RF lets it go on; a step from here on goes one instruction on. */
        if (i % 3 == 0) {
            go_on(PTRACE_SINGLESTEP, SIGTRAP);
            EXPECT(ip() != (uintptr_t)target, "a step that leads nowhere");
        }
    }
    set_debug(7, 0);
}

static void watching(void)
{
    for (unsigned length = 1; length <= sizeof(long); length *= 2) {
        for (unsigned type = 1; type <= 3; type += 2) {
            int number = 1 + (int)(length & 1);
            /* The child touches 16, which is watched, and 32, which is not. */
            set_debug(number, (uintptr_t)&shared->bytes[16]);
            set_debug(7, control(number, type, length));
            for (int i = 0; i < 12; i++) {
                go_on(PTRACE_CONT, SIGTRAP);
                EXPECT(get_debug(6) >> number & 1, "DR6 is %zx", (size_t)get_debug(6));
                uintptr_t at = ip();
                EXPECT(at > (uintptr_t)touch && at < (uintptr_t)touch + 256, "stopped at %zx", (size_t)at);
            }
            set_debug(7, 0);
            set_debug(number, 0);
        }
    }
    /* A turn of the child touches 16 so often, for writing and for both. */
    enum { LENGTHS = sizeof(long) == 8 ? 4 : 3 };
    set_debug(3, (uintptr_t)&shared->bytes[16]);
    for (unsigned type = 1; type <= 3; type += 2) {
        unsigned per_turn = LENGTHS * (type == 1 ? 1 : 2);
        set_debug(7, control(3, type, 1));
        go_on(PTRACE_CONT, SIGTRAP);
        uint64_t turn = shared->order[3];
        /* To the first of the next turn. */
        while (shared->order[3] == turn)
            go_on(PTRACE_CONT, SIGTRAP);
        turn = shared->order[3];
        unsigned stops = 0;
        do {
            stops++;
            go_on(PTRACE_CONT, SIGTRAP);
        } while (shared->order[3] == turn);
        EXPECT(stops == per_turn, "%u stops in a turn, type %u", stops, type);
    }
    set_debug(7, 0);
}

static void patched(void)
{
    uintptr_t at = (uintptr_t)target;
    for (int i = 0; i < 20; i++) {
        errno = 0;
        long old = ptrace(PTRACE_PEEKTEXT, child, at, NULL);
        NEED(errno == 0);
        NEED(ptrace(PTRACE_POKETEXT, child, at, (old & ~0xffL) | 0xcc) == 0);
        go_on(PTRACE_CONT, SIGTRAP);
        EXPECT(ip() == at + 1, "stopped at %zx", (size_t)ip());
        NEED(ptrace(PTRACE_POKETEXT, child, at, old) == 0);
        set_ip(at);
        uint64_t before = shared->order[2];
        /* It has to be executed, now that it is whole again. */
        set_debug(0, (uintptr_t)run_start);
        set_debug(7, control(0, 0, 1));
        go_on(PTRACE_CONT, SIGTRAP);
        EXPECT(ip() == (uintptr_t)run_start, "stopped at %zx", (size_t)ip());
        EXPECT(shared->order[2] == before + 1, "the function was executed");
        set_debug(7, 0);
    }
}

static void counted(void)
{
    for (int i = 0; i < 10; i++) {
        set_debug(0, (uintptr_t)run_start);
        set_debug(7, control(0, 0, 1));
        go_on(PTRACE_CONT, SIGTRAP);
        set_debug(7, 0);
        unsigned steps = 0;
        while (ip() != (uintptr_t)run_end) {
            go_on(PTRACE_SINGLESTEP, SIGTRAP);
            steps++;
            EXPECT(steps <= 8, "%u steps, at %zx", steps, (size_t)ip());
        }
        EXPECT(steps == 8, "%u steps", steps);
    }
}

static void everything(unsigned round)
{
    (void)round;
    if (!shared) {
        void *page = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
        NEED(page != MAP_FAILED);
        shared = page;
    }
    child = fork();
    NEED(child >= 0);
    if (child == 0)
        child_main();
    int status;
    NEED(waitpid(child, &status, 0) == child);
    EXPECT(WIFSTOPPED(status) && WSTOPSIG(status) == SIGSTOP, "the child has status %#x", status);
    /* However this ends, the child ends too. */
    NEED(ptrace(PTRACE_SETOPTIONS, child, NULL, PTRACE_O_EXITKILL) == 0);
    execution();
    watching();
    patched();
    counted();
    NEED(kill(child, SIGKILL) == 0);
    NEED(waitpid(child, &status, 0) == child);
}

int main(int argc, char **argv) { return prove("breakpoints", argc, argv, everything); }
