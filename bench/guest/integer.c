/*
 * Integer workloads: arithmetic, calls, branches, small objects on the heap.
 */
#include "work.h"

#include <stdlib.h>
#include <string.h>

/* ---- hash: SHA-256 ---- */

static const uint32_t sha256_constants[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5, 0xd807aa98, 0x12835b01, 0x243185be,
    0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa,
    0x5cb0a9dc, 0x76f988da, 0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967, 0x27b70a85,
    0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85, 0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3,
    0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070, 0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f,
    0x682e6ff3, 0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

static uint32_t rotate(uint32_t x, int n)
{
    return x >> n | x << (32 - n);
}

static void sha256_block(uint32_t state[8], const uint8_t *block)
{
    uint32_t w[64];
    for (int i = 0; i < 16; i++)
        w[i] = (uint32_t)block[4 * i] << 24 | (uint32_t)block[4 * i + 1] << 16 | (uint32_t)block[4 * i + 2] << 8 |
               block[4 * i + 3];
    for (int i = 16; i < 64; i++) {
        uint32_t s0 = rotate(w[i - 15], 7) ^ rotate(w[i - 15], 18) ^ w[i - 15] >> 3;
        uint32_t s1 = rotate(w[i - 2], 17) ^ rotate(w[i - 2], 19) ^ w[i - 2] >> 10;
        w[i] = w[i - 16] + s0 + w[i - 7] + s1;
    }
    uint32_t a = state[0], b = state[1], c = state[2], d = state[3];
    uint32_t e = state[4], f = state[5], g = state[6], h = state[7];
    for (int i = 0; i < 64; i++) {
        uint32_t s1 = rotate(e, 6) ^ rotate(e, 11) ^ rotate(e, 25);
        uint32_t t1 = h + s1 + ((e & f) ^ (~e & g)) + sha256_constants[i] + w[i];
        uint32_t s0 = rotate(a, 2) ^ rotate(a, 13) ^ rotate(a, 22);
        uint32_t t2 = s0 + ((a & b) ^ (a & c) ^ (b & c));
        h = g, g = f, f = e, e = d + t1, d = c, c = b, b = a, a = t1 + t2;
    }
    state[0] += a, state[1] += b, state[2] += c, state[3] += d;
    state[4] += e, state[5] += f, state[6] += g, state[7] += h;
}

void sha256(const uint8_t *data, size_t length, uint8_t digest[32])
{
    uint32_t state[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    size_t whole = length / 64 * 64, rest = length - whole;
    for (size_t at = 0; at < whole; at += 64)
        sha256_block(state, data + at);
    uint8_t last[128] = {0};
    size_t last_length = rest < 56 ? 64 : 128;
    memcpy(last, data + whole, rest);
    last[rest] = 0x80;
    for (int i = 0; i < 8; i++)
        last[last_length - 1 - (size_t)i] = (uint8_t)((uint64_t)length * 8 >> (8 * i));
    for (size_t at = 0; at < last_length; at += 64)
        sha256_block(state, last + at);
    for (int i = 0; i < 32; i++)
        digest[i] = (uint8_t)(state[i / 4] >> (24 - 8 * (i % 4)));
}

static uint8_t hash_data[256 << 10];

static void hash_prepare(void)
{
    /* The standard's own example. */
    static const uint8_t abc[4] = {0xba, 0x78, 0x16, 0xbf};
    uint8_t digest[32];
    sha256((const uint8_t *)"abc", 3, digest);
    if (memcmp(digest, abc, sizeof abc) != 0)
        fail("SHA-256 of \"abc\"");
    fill_text((char *)hash_data, sizeof hash_data);
}

static uint64_t hash_pass(void)
{
    uint8_t digest[32];
    uint64_t sum = CHECK_START;
    for (int i = 0; i < 12; i++) {
        sha256(hash_data + i, sizeof hash_data - (size_t)i, digest);
        sum = check(sum, digest, sizeof digest);
    }
    return sum;
}

/* ---- sort: a quicksort of our own on integers, then the library's with a comparison function ---- */

enum { SORTED = 60000 };
static uint32_t sort_data[SORTED], sort_work[SORTED];

static void sort_prepare(void)
{
    uint64_t random = 1;
    for (int i = 0; i < SORTED; i++)
        sort_data[i] = (uint32_t)next_random(&random);
}

static void quicksort(uint32_t *first, uint32_t *last)
{
    while (last - first > 12) {
        uint32_t pivot = first[(last - first) / 2], *low = first, *high = last;
        while (low <= high) {
            while (*low < pivot)
                low++;
            while (*high > pivot)
                high--;
            if (low <= high) {
                uint32_t swap = *low;
                *low++ = *high;
                *high-- = swap;
            }
        }
        quicksort(first, high);
        first = low;
    }
    for (uint32_t *at = first + 1; at <= last; at++) {
        uint32_t value = *at, *to = at;
        for (; to > first && to[-1] > value; to--)
            *to = to[-1];
        *to = value;
    }
}

static int compare(const void *left, const void *right)
{
    uint32_t l = *(const uint32_t *)left, r = *(const uint32_t *)right;
    return (l > r) - (l < r);
}

static uint64_t sort_pass(void)
{
    memcpy(sort_work, sort_data, sizeof sort_work);
    quicksort(sort_work, sort_work + SORTED - 1);
    uint64_t sum = check(CHECK_START, sort_work, sizeof sort_work);
    memcpy(sort_work, sort_data, sizeof sort_work);
    qsort(sort_work, SORTED, sizeof *sort_work, compare);
    return sum ^ check(CHECK_START, sort_work, sizeof sort_work) ^ sort_work[SORTED / 2];
}

/* ---- tree: a treap with a heap object per node ---- */

struct node {
    struct node *child[2];
    uint64_t key, priority;
};

static struct node *insert(struct node *node, uint64_t key, uint64_t priority)
{
    if (!node) {
        node = malloc(sizeof *node);
        if (!node)
            fail("malloc");
        *node = (struct node){.key = key, .priority = priority};
        return node;
    }
    int side = key > node->key;
    struct node *child = node->child[side] = insert(node->child[side], key, priority);
    if (child->priority > node->priority) {
        node->child[side] = child->child[!side];
        child->child[!side] = node;
        return child;
    }
    return node;
}

static uint64_t release(struct node *node, uint64_t depth)
{
    if (!node)
        return 0;
    uint64_t sum = release(node->child[0], depth + 1) * 3 + release(node->child[1], depth + 1) + (node->key ^ depth);
    free(node);
    return sum;
}

static uint64_t tree_pass(void)
{
    enum { NODES = 16000 };
    struct node *root = NULL;
    uint64_t random = 2, sum = 0;
    for (int i = 0; i < NODES; i++) {
        uint64_t key = next_random(&random);
        root = insert(root, key, next_random(&random));
    }
    random = 2;
    for (int i = 0; i < 2 * NODES; i++) {
        uint64_t key = next_random(&random);
        const struct node *node = root;
        while (node && node->key != key)
            node = node->child[key > node->key];
        sum = sum * 31 + (node ? node->priority : 1);
    }
    return sum ^ release(root, 0);
}

/* ---- recursion: Fibonacci, Ackermann, queens ---- */

__attribute__((noinline, optimize("no-optimize-sibling-calls"))) static uint64_t fibonacci(uint64_t n)
{
    return n < 2 ? n : fibonacci(n - 1) + fibonacci(n - 2);
}

__attribute__((noinline, optimize("no-optimize-sibling-calls"))) static uint64_t ackermann(uint64_t m, uint64_t n)
{
    if (m == 0)
        return n + 1;
    return ackermann(m - 1, n == 0 ? 1 : ackermann(m, n - 1));
}

__attribute__((noinline)) static uint64_t queens(unsigned columns, unsigned left, unsigned right, unsigned all)
{
    if (columns == all)
        return 1;
    uint64_t count = 0;
    for (unsigned free = all & ~(columns | left | right); free; free &= free - 1) {
        unsigned bit = free & -free;
        count += queens(columns | bit, (left | bit) << 1, (right | bit) >> 1, all);
    }
    return count;
}

static uint64_t recursion_pass(void)
{
    return fibonacci(31) * 1000003 + ackermann(2, 300) * 10007 + ackermann(3, 7) * 101 + queens(0, 0, 0, (1 << 9) - 1);
}

/* ---- bytecode: a small interpreter, whose every step is an indirect jump ---- */

enum { LOAD, ADD, SUBTRACT, MULTIPLY, XOR, SHIFT, COPY, LESS, JUMP_IF, HALT };
struct step {
    uint8_t what, to, left, right;
    int32_t number;
};

static uint64_t interpret(const struct step *program)
{
    static const void *const labels[] = {&&load, &&add, &&subtract, &&multiply, &&xor, &&shift, &&copy, &&less, &&jump_if, &&halt};
    uint64_t r[8] = {0};
    const struct step *s = program;
#define NEXT goto *labels[s->what]
    NEXT;
load:
    r[s->to] = (uint64_t)(int64_t)s->number;
    s++;
    NEXT;
add:
    r[s->to] = r[s->left] + r[s->right];
    s++;
    NEXT;
subtract:
    r[s->to] = r[s->left] - r[s->right];
    s++;
    NEXT;
multiply:
    r[s->to] = r[s->left] * r[s->right];
    s++;
    NEXT;
xor:
    r[s->to] = r[s->left] ^ r[s->right];
    s++;
    NEXT;
shift:
    r[s->to] = r[s->left] >> (s->number & 63);
    s++;
    NEXT;
copy:
    r[s->to] = r[s->left];
    s++;
    NEXT;
less:
    r[s->to] = r[s->left] < r[s->right];
    s++;
    NEXT;
jump_if:
    s += r[s->left] ? s->number : 1;
    NEXT;
halt:
    return r[0];
#undef NEXT
}

static uint64_t bytecode_pass(void)
{
    /* r0: a sum that each round mixes; r1: the round; r2: the rounds; r3: one; r4: a multiplier. */
    static const struct step program[] = {
        {LOAD, 0, 0, 0, 12345}, {LOAD, 1, 0, 0, 0},      {LOAD, 2, 0, 0, 1000000}, {LOAD, 3, 0, 0, 1},
        {LOAD, 4, 0, 0, 69069}, {MULTIPLY, 0, 0, 4, 0},  {ADD, 0, 0, 1, 0},       {SHIFT, 5, 0, 0, 17},
        {XOR, 0, 0, 5, 0},      {SUBTRACT, 5, 0, 1, 0},  {COPY, 6, 5, 0, 0},      {XOR, 0, 0, 6, 0},
        {ADD, 1, 1, 3, 0},      {LESS, 7, 1, 2, 0},      {JUMP_IF, 0, 7, 0, -9},  {HALT, 0, 0, 0, 0},
    };
    return interpret(program);
}

/* ---- bignum: 1024-bit modular exponentiation (Montgomery), which is multiplications and carries ---- */

enum { LIMBS = 16 };

static void montgomery(uint64_t *to, const uint64_t *a, const uint64_t *b, const uint64_t *modulus, uint64_t inverse)
{
    uint64_t t[LIMBS + 2] = {0};
    for (int i = 0; i < LIMBS; i++) {
        unsigned __int128 carry = 0;
        for (int j = 0; j < LIMBS; j++) {
            carry += (unsigned __int128)a[j] * b[i] + t[j];
            t[j] = (uint64_t)carry;
            carry >>= 64;
        }
        carry += t[LIMBS];
        t[LIMBS] = (uint64_t)carry;
        t[LIMBS + 1] = (uint64_t)(carry >> 64);
        uint64_t m = t[0] * inverse;
        carry = ((unsigned __int128)m * modulus[0] + t[0]) >> 64;
        for (int j = 1; j < LIMBS; j++) {
            carry += (unsigned __int128)m * modulus[j] + t[j];
            t[j - 1] = (uint64_t)carry;
            carry >>= 64;
        }
        carry += t[LIMBS];
        t[LIMBS - 1] = (uint64_t)carry;
        t[LIMBS] = t[LIMBS + 1] + (uint64_t)(carry >> 64);
    }
    uint64_t less[LIMBS], borrow = 0;
    for (int i = 0; i < LIMBS; i++) {
        unsigned __int128 difference = (unsigned __int128)t[i] - modulus[i] - borrow;
        less[i] = (uint64_t)difference;
        borrow = (uint64_t)(difference >> 64) & 1;
    }
    memcpy(to, t[LIMBS] >= borrow ? less : t, sizeof less);
}

static uint64_t bignum_pass(void)
{
    uint64_t modulus[LIMBS], base[LIMBS], power[LIMBS], exponent[LIMBS], random = 3, inverse = 1;
    for (int i = 0; i < LIMBS; i++) {
        modulus[i] = next_random(&random);
        base[i] = power[i] = next_random(&random);
        exponent[i] = next_random(&random);
    }
    modulus[0] |= 1;
    modulus[LIMBS - 1] |= 1ull << 63;
    base[LIMBS - 1] >>= 1;
    power[LIMBS - 1] >>= 1;
    /* Newton: each step doubles the bits of 1/modulus that are right. */
    for (int i = 0; i < 6; i++)
        inverse *= 2 - modulus[0] * inverse;
    for (int round = 0; round < 16; round++) {
        for (int bit = 0; bit < 64 * LIMBS; bit++) {
            montgomery(power, power, power, modulus, -inverse);
            if (exponent[bit / 64] >> (bit % 64) & 1)
                montgomery(power, power, base, modulus, -inverse);
        }
    }
    return check(CHECK_START, power, sizeof power);
}

const struct workload integer_workloads[] = {
    {"hash", 8, hash_pass, hash_prepare},
    {"sort", 8, sort_pass, sort_prepare},
    {"tree", 8, tree_pass, NULL},
    {"recursion", 8, recursion_pass, NULL},
    {"bytecode", 10, bytecode_pass, NULL},
    {"bignum", 10, bignum_pass, NULL},
    {0},
};
