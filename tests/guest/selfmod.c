/*
 * selfmod: code that is rewritten, in every way that comes to mind: by itself, just ahead of itself, in the loop that
 * it is, over a page's end, by another address, by the kernel, by another thread, by a child, with and without the right
 * to write at the same time.
 */
#include "proof.h"

#include <fcntl.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <sys/wait.h>

/* A number in an instruction, written anew before each call. */
static void from_outside(unsigned round)
{
    uint8_t *code = pages(1), *at = code + 100;
    put_ret(put_mov_eax(at, 0));
    for (uint32_t i = 0; i < 3000; i++) {
        uint32_t number = i * 2654435761u + round;
        put32(at + 1, number);
        EXPECT(call(at) == number, "call %u", i);
        /* And run often enough unchanged that it is worth translating. */
        if (i % 1000 == 0)
            for (int j = 0; j < 2000; j++)
                EXPECT(call(at) == number, "call %u again", i);
    }
    munmap(code, PAGE);
}

/* The instruction that is stored to is the very next one; at every place relative to a page's end. */
static void just_ahead(unsigned round)
{
    uint8_t *code = pages(2);
    for (int offset = -24; offset <= 2; offset++) {
        uint8_t *start = code + PAGE + offset, *at = start;
        /* mov dword [next instruction's number], NUMBER; mov eax, 0; ret */
        uint8_t *next = start + 10;
        at = PUT(at, 0xc7, 0x05);
        at = put_address(at, next + 1, 4);
        uint8_t *number_at = at;
        at = put32(at, 0);
        EXPECT(at == next, "the instruction has %d bytes", (int)(at - start));
        put_ret(put_mov_eax(at, 0));
        for (uint32_t i = 1; i < 60; i++) {
            uint32_t number = (i << 16) + (uint32_t)offset + round;
            put32(number_at, number);
            put32(next + 1, ~number);
            uint32_t got = call(start);
            EXPECT(got == number, "offset %d: %08x instead of %08x", offset, got, number);
        }
    }
    munmap(code, 2 * PAGE);
}

/* A loop whose every turn changes an instruction of the loop. */
static void own_loop(unsigned round)
{
    uint8_t *code = pages(2);
    for (int offset = -24; offset <= 0; offset += 3) {
        enum { TURNS = 200 };
        uint32_t first = round * 7 + 1;
        uint8_t *start = code + PAGE + offset, *at = start;
        at = put32(PUT(at, 0xb9), TURNS);               /* mov ecx, TURNS */
        at = PUT(at, 0x31, 0xc0);                       /* xor eax, eax */
        uint8_t *loop = at;
        at = put32(PUT(at, 0x05), first);               /* add eax, FIRST */
        at = put_address(PUT(at, 0xff, 0x05), loop + 1, 0); /* inc dword [that number] */
        at = PUT(at, 0xff, 0xc9);                       /* dec ecx */
        at = PUT(at, 0x75, (uint8_t)(loop - (at + 2))); /* jnz loop */
        put_ret(at);
        uint32_t got = call(start), expected = TURNS * first + TURNS * (TURNS - 1) / 2;
        EXPECT(got == expected, "offset %d: %u instead of %u", offset, got, expected);
    }
    munmap(code, 2 * PAGE);
}

/* One instruction over a page's end; either of its parts is changed. */
static void over_the_end(unsigned round)
{
    uint8_t *code = pages(2);
    for (int offset = -5; offset <= 0; offset++) {
        uint8_t *at = code + PAGE + offset;
        uint32_t number = 0x01020304 + round;
        put_ret(put_mov_eax(at, number));
        EXPECT(call(at) == number, "offset %d", offset);
        for (int i = 0; i < 400; i++) {
            int byte = i % 4;
            at[1 + byte] ^= (uint8_t)(i + 1);
            number ^= (uint32_t)(uint8_t)(i + 1) << (8 * byte);
            uint32_t got = call(at);
            EXPECT(got == number, "offset %d, byte %d: %08x instead of %08x", offset, byte, got, number);
        }
    }
    munmap(code, 2 * PAGE);
}

/* Instructions of other lengths in the same place, by REP MOVSB, REP STOSB and by the kernel. */
static void other_code(unsigned round)
{
    uint8_t *code = pages(3), *at = code + PAGE - 40;
    int ends[2];
    NEED(pipe(ends) == 0);
    for (uint32_t i = 0; i < 300; i++) {
        uint8_t new_code[100], *new_at = new_code;
        for (uint32_t fill = i % 60; fill > 0; fill--)
            new_at = fill % 3 == 0 ? PUT(new_at, 0x90) : fill % 3 == 1 ? PUT(new_at, 0x66, 0x90) : PUT(new_at, 0x0f, 0x1f, 0x00);
        new_at = put_ret(put_mov_eax(new_at, i ^ round));
        size_t length = (size_t)(new_at - new_code);
        switch (i % 3) {
        case 0: {
            void *to = at, *from = new_code;
            size_t count = length;
            __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(count) : : "memory");
            break;
        }
        case 1: {
            /* NOPs all over, then the end. */
            void *to = at;
            size_t count = 64;
            __asm__ volatile("rep stosb" : "+D"(to), "+c"(count) : "a"(0x90) : "memory");
            put_ret(put_mov_eax(at + 64, i ^ round));
            break;
        }
        default:
            NEED(write(ends[1], new_code, length) == (ssize_t)length);
            NEED(read(ends[0], at, length) == (ssize_t)length);
        }
        EXPECT(call(at) == (i ^ round), "code %u", i);
    }
    close(ends[0]), close(ends[1]);
    munmap(code, 3 * PAGE);
}

/* Written by one address, executed by another. */
static void two_addresses(unsigned round)
{
    int fd = memfd_create("code", 0);
    NEED(fd >= 0 && ftruncate(fd, PAGE) == 0);
    uint8_t *writable = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    uint8_t *code = mmap(NULL, PAGE, PROT_READ | PROT_EXEC, MAP_SHARED, fd, 0);
    NEED(writable != MAP_FAILED && code != MAP_FAILED);
    put_ret(put_mov_eax(writable, 0));
    for (uint32_t i = 0; i < 2000; i++) {
        put32(writable + 1, i + round);
        serialise();
        EXPECT(call(code) == i + round, "call %u", i);
    }
    /* And through the file. */
    for (uint32_t i = 0; i < 200; i++) {
        uint32_t number = ~i ^ round;
        NEED(pwrite(fd, &number, sizeof number, 1) == sizeof number);
        EXPECT(call(code) == number, "call %u", i);
    }
    close(fd);
    munmap(writable, PAGE), munmap(code, PAGE);
}

/* Never writable and executable at once, as JIT compilers do it; then other pages at the same address. */
static void write_then_execute(unsigned round)
{
    uint8_t *code = pages(1);
    for (uint32_t i = 0; i < 300; i++) {
        NEED(mprotect(code, PAGE, PROT_READ | PROT_WRITE) == 0);
        put_ret(put_mov_eax(code + i % 64, i + round));
        NEED(mprotect(code, PAGE, PROT_READ | PROT_EXEC) == 0);
        EXPECT(call(code + i % 64) == i + round, "call %u", i);
    }
    for (uint32_t i = 0; i < 300; i++) {
        uint8_t *again = mmap(code, PAGE, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
        NEED(again == code);
        put_ret(put_mov_eax(code, i * 3 + round));
        EXPECT(call(code) == i * 3 + round, "mapping %u", i);
    }
    munmap(code, PAGE);
}

/* Two pages of code swap places. */
static void moved_pages(unsigned round)
{
    uint8_t *code = pages(3);
    put_ret(put_mov_eax(code, round));
    put_ret(put_mov_eax(code + PAGE, ~round));
    for (int i = 0; i < 200; i++) {
        bool swapped = i % 2;
        EXPECT(call(code) == (swapped ? ~round : round), "turn %d", i);
        EXPECT(call(code + PAGE) == (swapped ? round : ~round), "turn %d", i);
        NEED(mremap(code, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, code + 2 * PAGE) != MAP_FAILED);
        NEED(mremap(code + PAGE, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, code) != MAP_FAILED);
        NEED(mremap(code + 2 * PAGE, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, code + PAGE) != MAP_FAILED);
    }
    munmap(code, 2 * PAGE);
}

/* Data beside the code, on its page: nothing may be lost, however often the page is taken for code. */
static void data_beside(unsigned round)
{
    uint8_t *code = pages(1), *at = code;
    volatile uint32_t *data = (volatile uint32_t *)(code + 2048);
    *data = round;
    put_ret(put_address(PUT(at, 0xff, 0x05), code + 2048, 0)); /* inc dword [data] */
    for (uint32_t i = 0; i < 3000; i++) {
        call(code);
        EXPECT(*data == round + 2 * i + 1, "%u after call %u", *data, i);
        ++*data;
    }
    munmap(code, PAGE);
}

/* The program that a fork leaves behind is not changed by what the child does to its copy. */
static void child_changes(unsigned round)
{
    uint8_t *code = pages(1);
    put_ret(put_mov_eax(code, round));
    for (int i = 0; i < 5; i++) {
        EXPECT(call(code) == round, "before child %d", i);
        pid_t child = fork();
        NEED(child >= 0);
        if (child == 0) {
            put32(code + 1, round + 1);
            _exit(call(code) == round + 1 ? 0 : 1);
        }
        int status;
        NEED(waitpid(child, &status, 0) == child);
        EXPECT(status == 0, "the child ended with %#x", status);
        EXPECT(call(code) == round, "after child %d", i);
    }
    munmap(code, PAGE);
}

/* A breakpoint is set in code that runs hot, and taken away in its handler. */
static uint8_t *trapped;
static volatile int traps;

static void on_trap(int number, siginfo_t *info, void *context)
{
    (void)number, (void)info;
    greg_t *ip = &((ucontext_t *)context)->uc_mcontext.gregs[REGISTER_IP];
    EXPECT((uint8_t *)*ip == trapped + 1, "the trap is at %p", (void *)*ip);
    *trapped = 0xb8;
    *ip = (greg_t)trapped;
    traps++;
}

static void breakpoint(unsigned round)
{
    uint8_t *code = pages(1);
    handle(SIGTRAP, on_trap);
    put_ret(put_mov_eax(code, round));
    trapped = code;
    traps = 0;
    for (int i = 0; i < 200; i++) {
        for (int j = 0; j < 50; j++)
            EXPECT(call(code) == round, "turn %d", i);
        *code = 0xcc;
        EXPECT(call(code) == round, "turn %d", i);
        EXPECT(traps == i + 1, "%d traps after turn %d", traps, i);
    }
    signal(SIGTRAP, SIG_DFL);
    munmap(code, PAGE);
}

/* ---- two threads ---- */

enum { CHANGES = 1500 };
static uint8_t *shared_code;
static volatile uint32_t written, executed;

/* Changes the number, says so, waits until it was executed. */
static void *change_in_turns(void *unused)
{
    for (uint32_t i = 1; i <= CHANGES; i++) {
        put32(shared_code + 1, i);
        __atomic_store_n(&written, i, __ATOMIC_SEQ_CST);
        while (__atomic_load_n(&executed, __ATOMIC_SEQ_CST) != i)
            sched_yield();
    }
    return unused;
}

/* Changes the number as fast as it can; it is aligned, so that it changes at once. */
static void *change_freely(void *unused)
{
    for (uint32_t i = 1; i <= CHANGES * 20; i++)
        __atomic_store_n((uint32_t *)(shared_code + 1), i, __ATOMIC_SEQ_CST);
    __atomic_store_n(&written, 1, __ATOMIC_SEQ_CST);
    return unused;
}

static void other_thread(unsigned round)
{
    (void)round;
    pthread_t thread;
    shared_code = pages(1) + 63;
    put_ret(put_mov_eax(shared_code, 0));

    written = executed = 0;
    NEED(pthread_create(&thread, NULL, change_in_turns, NULL) == 0);
    for (uint32_t i = 1; i <= CHANGES; i++) {
        while (__atomic_load_n(&written, __ATOMIC_SEQ_CST) != i)
            sched_yield();
        serialise();
        uint32_t got = call(shared_code);
        EXPECT(got == i, "%u instead of %u", got, i);
        __atomic_store_n(&executed, i, __ATOMIC_SEQ_CST);
    }
    NEED(pthread_join(thread, NULL) == 0);

    written = 0;
    put32(shared_code + 1, 0);
    uint32_t last = 0;
    NEED(pthread_create(&thread, NULL, change_freely, NULL) == 0);
    bool over;
    do {
        over = __atomic_load_n(&written, __ATOMIC_SEQ_CST);
        if (over)
            serialise();
        uint32_t got = call(shared_code);
        EXPECT(got >= last && got <= CHANGES * 20, "%u after %u", got, last);
        last = got;
    } while (!over);
    EXPECT(last == CHANGES * 20, "%u at the end", last);
    NEED(pthread_join(thread, NULL) == 0);
    munmap(shared_code - 63, PAGE);
}

/* Two threads, each of which writes and runs code of its own on the same page. */
static void *own_corner(void *place)
{
    uint8_t *code = place;
    put_ret(put_mov_eax(code, 0));
    for (uint32_t i = 0; i < 2000; i++) {
        put32(code + 1, i);
        uint32_t got = call(code);
        EXPECT(got == i, "%u instead of %u", got, i);
    }
    return NULL;
}

static void one_page(unsigned round)
{
    (void)round;
    pthread_t thread;
    uint8_t *code = pages(1);
    NEED(pthread_create(&thread, NULL, own_corner, code + 256) == 0);
    own_corner(code + 3000);
    NEED(pthread_join(thread, NULL) == 0);
    munmap(code, PAGE);
}

static void everything(unsigned round)
{
    from_outside(round);
    just_ahead(round);
    own_loop(round);
    over_the_end(round);
    other_code(round);
    two_addresses(round);
    write_then_execute(round);
    moved_pages(round);
    data_beside(round);
    child_changes(round);
    breakpoint(round);
    other_thread(round);
    one_page(round);
}

int main(int argc, char **argv) { return prove("selfmod", argc, argv, everything); }
