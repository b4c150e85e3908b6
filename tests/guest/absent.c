/*
 * absent: pages that are not there, or not for this, when code or data reaches into them. The handler looks at the
 * address of the fault and at the registers, which have to be those before the instruction, and then makes the page good.
 */
#include "proof.h"

#include <emmintrin.h>
#include <setjmp.h>

enum why { UNMAPPED, NO_RIGHTS, NO_EXECUTE, READ_ONLY };
static const char *const whys[] = {"unmapped", "no rights", "no execute", "read only"};

/* What the handler expects, and what it does about it. */
static struct {
    uint8_t *page;
    enum why why;
    /* 0: not looked at. */
    const uint8_t *address, *ip;
    int protection;
    volatile int faults;
    /* The registers at the last fault. */
    uintptr_t ax, cx, si, di;
    /* What the page is filled with when it comes. */
    uint8_t fill[64];
    size_t fill_length;
} absent;

static void on_fault(int number, siginfo_t *info, void *context)
{
    const greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    const uint8_t *ip = (const uint8_t *)registers[REGISTER_IP];
    EXPECT(number == SIGSEGV, "signal %d", number);
    EXPECT(absent.faults == 0, "a second fault at %p by %p", info->si_addr, (const void *)ip);
    EXPECT(info->si_code == (absent.why == UNMAPPED ? SEGV_MAPERR : SEGV_ACCERR), "code %d, %s", info->si_code, whys[absent.why]);
    EXPECT(!absent.address || info->si_addr == absent.address, "the fault is at %p instead of %p, %s", info->si_addr,
           (const void *)absent.address, whys[absent.why]);
    EXPECT(!absent.ip || ip == absent.ip, "the instruction is at %p instead of %p, %s", (const void *)ip,
           (const void *)absent.ip, whys[absent.why]);
    absent.ax = (uintptr_t)registers[REGISTER_AX];
    absent.cx = (uintptr_t)registers[REGISTER_CX];
    absent.si = (uintptr_t)registers[REGISTER_SI];
    absent.di = (uintptr_t)registers[REGISTER_DI];
    if (absent.why == UNMAPPED) {
        void *page = mmap(absent.page, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
        EXPECT(page == absent.page, "no page in the handler");
    } else {
        EXPECT(mprotect(absent.page, PAGE, PROT_READ | PROT_WRITE) == 0, "no rights in the handler");
    }
    memcpy(absent.page, absent.fill, absent.fill_length);
    EXPECT(mprotect(absent.page, PAGE, absent.protection) == 0, "no protection in the handler");
    absent.faults++;
}

/* Takes a page away. */
static void take(uint8_t *page, enum why why)
{
    absent.page = page;
    absent.why = why;
    absent.faults = 0;
    absent.address = absent.ip = NULL;
    absent.fill_length = 0;
    if (why == UNMAPPED)
        NEED(munmap(page, PAGE) == 0);
    else
        NEED(mprotect(page, PAGE, why == NO_RIGHTS ? PROT_NONE : PROT_READ) == 0);
}

/* Makes a page like at the beginning. */
static void give_back(uint8_t *page)
{
    uint8_t *again = mmap(page, PAGE, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    NEED(again == page);
}

/* Code that goes on into a page that is not there: with its end in the first page, or an instruction over the end. */
static void code_goes_on(unsigned round)
{
    uint8_t *code = pages(2), *second = code + PAGE;
    uint32_t number = 0x12345678 ^ round;
    for (enum why why = UNMAPPED; why <= NO_EXECUTE; why++) {
        for (int offset = -8; offset <= 0; offset++) {
            /* inc ecx (as it is written in both modes); mov eax, NUMBER; ret */
            uint8_t *start = second + offset, bytes[8];
            put_ret(put_mov_eax(PUT(bytes, 0xff, 0xc1), number));
            for (int hot = 0; hot < 2; hot++) {
                give_back(second);
                memcpy(start, bytes, sizeof bytes);
                /* Also when it ran before, often, and the page then goes. */
                for (int i = 0; hot && i < 300; i++)
                    EXPECT(call(start) == number, "offset %d, %s", offset, whys[why]);
                take(second, why);
                absent.protection = PROT_READ | PROT_EXEC;
                absent.address = second;
                /* Which of the three it is. */
                const uint8_t *mov = start + 2, *ret = start + 7;
                absent.ip = second <= start ? start : second < mov ? start : second < ret ? mov : ret;
                absent.fill_length = (size_t)(start + sizeof bytes - second);
                memcpy(absent.fill, start + sizeof bytes - absent.fill_length < start ? bytes : bytes + (second - start),
                       absent.fill_length);
                uint32_t got = call(start);
                int expected_faults = start + sizeof bytes > second;
                EXPECT(absent.faults == expected_faults, "%d faults, offset %d, %s", absent.faults, offset, whys[why]);
                EXPECT(got == number, "%08x, offset %d, %s", got, offset, whys[why]);
            }
        }
    }
    give_back(second);
    munmap(code, 2 * PAGE);
}

/* A jump and a call to a page that is not there. */
static void jumps_there(unsigned round)
{
    uint8_t *code = pages(2), *second = code + PAGE;
    for (enum why why = UNMAPPED; why <= NO_EXECUTE; why++) {
        for (int i = 0; i < 20; i++) {
            uint8_t *start = code + 10 * i;
            /* jmp second */
            put32(PUT(start, 0xe9), (uint32_t)(second - (start + 5)));
            put_ret(put_mov_eax(second, round));
            for (int j = 0; j < i * 10; j++)
                EXPECT(call(start) == round, "before, %s", whys[why]);
            take(second, why);
            absent.protection = PROT_READ | PROT_EXEC;
            absent.address = absent.ip = second;
            put_ret(put_mov_eax(absent.fill, ~round));
            absent.fill_length = 6;
            EXPECT(call(i % 2 ? start : second) == ~round, "%s", whys[why]);
            EXPECT(absent.faults == 1, "%d faults", absent.faults);
            give_back(second);
        }
    }
    munmap(code, 2 * PAGE);
}

/* An access of each kind to memory whose second page is not there. Returns something made of what was read. */
enum access { LOAD4, LOAD8, LOAD_VECTOR, LOAD_X87, STORE4, STORE_VECTOR, STORE_X87, ADD_TO, EXCHANGE, LOCKED_ADD, PUSH_MEMORY, ACCESSES };
static const char *const accesses[] = {"load of 4", "load of 8", "vector load", "x87 load", "store of 4", "vector store",
                                       "x87 store", "add to memory", "exchange", "locked add", "push of memory"};
static const unsigned access_length[] = {4, 8, 16, 10, 4, 16, 10, 4, 4, 4, sizeof(long)};
static bool is_store(enum access access) { return access >= STORE4 && access <= LOCKED_ADD; }

static void access_memory(enum access access, uint8_t *at)
{
    uint32_t four = 0x11223344;
    uint64_t eight;
    __m128i vector = _mm_set1_epi32(0x55667788);
    long double x = 1.5L;
    unsigned long word;
    switch (access) {
    case LOAD4: __asm__ volatile("movl (%1), %0" : "=r"(four) : "r"(at) : "memory"); break;
    case LOAD8: __asm__ volatile("movq (%1), %%xmm1; movq %%xmm1, %0" : "=m"(eight) : "r"(at) : "memory", "xmm1"); break;
    case LOAD_VECTOR: __asm__ volatile("movdqu (%1), %0" : "=x"(vector) : "r"(at) : "memory"); break;
    case LOAD_X87: __asm__ volatile("fldt (%1); fstpt %0" : "=m"(x) : "r"(at) : "memory"); break;
    case STORE4: __asm__ volatile("movl %0, (%1)" : : "r"(four), "r"(at) : "memory"); break;
    case STORE_VECTOR: __asm__ volatile("movdqu %0, (%1)" : : "x"(vector), "r"(at) : "memory"); break;
    case STORE_X87: __asm__ volatile("fldt %0; fstpt (%1)" : : "m"(x), "r"(at) : "memory"); break;
    case ADD_TO: __asm__ volatile("addl %0, (%1)" : : "r"(four), "r"(at) : "memory", "cc"); break;
    case EXCHANGE: __asm__ volatile("xchgl %0, (%1)" : "+r"(four) : "r"(at) : "memory"); break;
    case LOCKED_ADD: __asm__ volatile("lock addl %0, (%1)" : : "r"(four), "r"(at) : "memory", "cc"); break;
    /* (Away from the red zone.) */
#ifdef __x86_64__
    case PUSH_MEMORY: __asm__ volatile("subq $128, %%rsp; pushq (%1); popq %0; addq $128, %%rsp" : "=&r"(word) : "r"(at) : "memory", "cc"); break;
#else
    case PUSH_MEMORY: __asm__ volatile("pushl (%1); popl %0" : "=&r"(word) : "r"(at) : "memory"); break;
#endif
    case ACCESSES: break;
    }
}

static void data_goes_on(unsigned round)
{
    uint8_t *data = pages(2), *second = data + PAGE;
    for (enum access access = 0; access < ACCESSES; access++) {
        for (int i = 0; i < 3; i++) {
            enum why why = i == 0 ? UNMAPPED : i == 1 ? NO_RIGHTS : READ_ONLY;
            if (why == READ_ONLY && !is_store(access))
                continue;
            for (int offset = -(int)access_length[access] + 1; offset <= 0; offset++) {
                uint8_t *at = second + offset;
                give_back(second);
                memset(data, (int)round, PAGE);
                for (int j = 0; j < 5; j++)
                    access_memory(access, at);
                uint8_t before[16];
                memcpy(before, at, (size_t)-offset);
                take(second, why);
                absent.protection = PROT_READ | PROT_WRITE;
                absent.address = second;
                /* What was in the first page may only change when the whole is done. */
                access_memory(access, at);
                EXPECT(absent.faults == 1, "%d faults, %s, offset %d, %s", absent.faults, accesses[access], offset, whys[why]);
                if (access == STORE4)
                    EXPECT(memcmp(at, (const uint8_t[]){0x44, 0x33, 0x22, 0x11}, 4) == 0, "offset %d", offset);
            }
        }
    }
    give_back(second);
    munmap(data, 2 * PAGE);
}

/* A store over the end that faults leaves the first page as it was: seen by a handler that gives up. */
static sigjmp_buf give_up_to;

static void on_fault_give_up(int number, siginfo_t *info, void *context)
{
    (void)number, (void)info, (void)context;
    siglongjmp(give_up_to, 1);
}

static void nothing_is_half_stored(unsigned round)
{
    uint8_t *data = pages(2), *volatile second = data + PAGE;
    handle(SIGSEGV, on_fault_give_up);
    NEED(mprotect(second, PAGE, PROT_READ) == 0);
    for (volatile enum access access = STORE4; access <= LOCKED_ADD; access++) {
        for (volatile int offset = -(int)access_length[access] + 1; offset < 0; offset++) {
            memset(data, (int)(round + 1), PAGE);
            if (sigsetjmp(give_up_to, 1) == 0) {
                access_memory(access, second + offset);
                EXPECT(false, "no fault: %s, offset %d", accesses[access], offset);
            }
            for (int i = offset; i < 0; i++)
                EXPECT(second[i] == (uint8_t)(round + 1), "%s, offset %d: byte %d is %02x", accesses[access], offset, i, second[i]);
        }
    }
    handle(SIGSEGV, on_fault);
    munmap(data, 2 * PAGE);
}

/* REP MOVS and STOS stop at the page's end with the registers saying how far they came. */
static void strings_stop(unsigned round)
{
    uint8_t *data = pages(4), *second = data + PAGE, *other = data + 2 * PAGE;
    for (int i = 0; i < 40; i++) {
        size_t ahead = (size_t)i * 7 + 1, after = 100, done;
        for (size_t j = 0; j < 2 * PAGE; j++)
            other[j] = (uint8_t)(j * 3 + round);
        void *to, *from;
        size_t count;

        give_back(second);
        take(second, i % 3 == 0 ? READ_ONLY : i % 3 == 1 ? NO_RIGHTS : UNMAPPED);
        absent.protection = PROT_READ | PROT_WRITE;
        absent.address = second;
        to = second - ahead, from = other, count = ahead + after;
        __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(count) : : "memory");
        done = ahead + after - absent.cx;
        EXPECT(absent.faults == 1 && done == ahead, "%zu bytes done of %zu", done, ahead);
        EXPECT(absent.di == (uintptr_t)second && absent.si == (uintptr_t)other + ahead, "di %zx, si %zx", (size_t)absent.di, (size_t)absent.si);
        EXPECT(memcmp(second - ahead, other, ahead + after) == 0, "ahead %zu", ahead);

        /* Reading from the page that is not there, by words. */
        give_back(second);
        take(second, i % 2 ? NO_RIGHTS : UNMAPPED);
        absent.protection = PROT_READ | PROT_WRITE;
        absent.address = second;
        to = other, from = second - 4 * ahead, count = ahead + after;
        __asm__ volatile("rep movsl" : "+D"(to), "+S"(from), "+c"(count) : : "memory");
        EXPECT(absent.faults == 1 && absent.cx == after, "%zu words left", (size_t)absent.cx);

        /* Backwards. */
        give_back(second);
        take(data, i % 2 ? NO_RIGHTS : READ_ONLY);
        absent.protection = PROT_READ | PROT_WRITE;
        to = second + ahead, count = ahead + 1 + after;
        __asm__ volatile("std; rep stosb; cld" : "+D"(to), "+c"(count) : "a"(i) : "memory", "cc");
        EXPECT(absent.faults == 1 && absent.cx == after && absent.di == (uintptr_t)second - 1, "%zu left", (size_t)absent.cx);
    }
    munmap(data, 4 * PAGE);
}

static void everything(unsigned round)
{
    handle(SIGSEGV, on_fault);
    code_goes_on(round);
    jumps_there(round);
    data_goes_on(round);
    nothing_is_half_stored(round);
    strings_stop(round);
}

int main(int argc, char **argv) { return prove("absent", argc, argv, everything); }
