/*
 * Floating point, SIMD and AES instructions.
 *
 * The checksums are of the bits of the results. Every operation used is one that IEEE 754 (or the instruction's
 * definition) gives one right result.
 */
#include "work.h"

#include <immintrin.h>
#include <string.h>

/* ---- float: loops over single precision that the compiler turns into SSE2 ---- */

enum { FLOATS = 4096 };
static float fa[FLOATS], fb[FLOATS], fc[FLOATS];

__attribute__((noinline, optimize("O3"))) static void float_step(float *restrict a, const float *restrict b,
                                                                 float *restrict c, float factor)
{
    for (int i = 0; i < FLOATS; i++)
        a[i] = a[i] * factor + b[i];
    for (int i = 0; i < FLOATS; i++)
        c[i] = (b[i] - a[i]) * (b[i] + a[i]) * 0.25f + c[i] * 0.5f;
    for (int i = 0; i < FLOATS; i++)
        a[i] = c[i] > a[i] ? c[i] * 0.125f : a[i] * 0.75f;
}

static uint64_t float_pass(void)
{
    uint64_t random = 8;
    for (int i = 0; i < FLOATS; i++) {
        fa[i] = (float)(next_random(&random) >> 40) / (1 << 24);
        fb[i] = (float)(next_random(&random) >> 40) / (1 << 24);
        fc[i] = 0;
    }
    for (int i = 0; i < 3000; i++)
        float_step(fa, fb, fc, 0.5f + (float)(i & 15) / 64);
    return check(check(CHECK_START, fa, sizeof fa), fc, sizeof fc);
}

/* ---- double: bodies that attract each other; scalar, with divisions and square roots ---- */

static uint64_t double_pass(void)
{
    enum { BODIES = 8 };
    double p[BODIES][3], v[BODIES][3] = {{0}}, m[BODIES];
    uint64_t random = 9;
    for (int i = 0; i < BODIES; i++) {
        for (int k = 0; k < 3; k++)
            p[i][k] = (double)(next_random(&random) >> 11) / (1ull << 50);
        m[i] = 1 + (double)(next_random(&random) >> 11) / (1ull << 53);
    }
    for (int step = 0; step < 75000; step++) {
        for (int i = 0; i < BODIES; i++) {
            for (int j = i + 1; j < BODIES; j++) {
                double dx = p[i][0] - p[j][0], dy = p[i][1] - p[j][1], dz = p[i][2] - p[j][2];
                double square = dx * dx + dy * dy + dz * dz + 0.01;
                double pull = 0.001 / (square * __builtin_sqrt(square));
                v[i][0] -= dx * m[j] * pull, v[i][1] -= dy * m[j] * pull, v[i][2] -= dz * m[j] * pull;
                v[j][0] += dx * m[i] * pull, v[j][1] += dy * m[i] * pull, v[j][2] += dz * m[i] * pull;
            }
        }
        for (int i = 0; i < BODIES; i++)
            for (int k = 0; k < 3; k++)
                p[i][k] += v[i][k] * 0.001;
    }
    return check(CHECK_START, p, sizeof p);
}

/* ---- x87: the same kind of work in the old registers, at their 64 bits of precision ---- */

static uint64_t x87_pass(void)
{
    long double sum = 0, x = 0.3L;
    for (int i = 1; i < 2400000; i++) {
        x = 3.9L * x * (1 - x);
        sum += __builtin_sqrtl(x) / i;
    }
    return check(CHECK_START, &sum, 10);
}

/* ---- avx2: matrix multiplication with FMA, and integer lanes with shuffles and gathers ---- */

enum { SIDE = 96 };
static float ma[SIDE][SIDE], mb[SIDE][SIDE], mc[SIDE][SIDE];
static uint32_t lanes[8192];

__attribute__((noinline, target("avx2,fma"))) static void multiply(void)
{
    for (int i = 0; i < SIDE; i++) {
        for (int j = 0; j < SIDE; j += 16) {
            __m256 low = _mm256_setzero_ps(), high = _mm256_setzero_ps();
            for (int k = 0; k < SIDE; k++) {
                __m256 a = _mm256_broadcast_ss(&ma[i][k]);
                low = _mm256_fmadd_ps(a, _mm256_loadu_ps(&mb[k][j]), low);
                high = _mm256_fmadd_ps(a, _mm256_loadu_ps(&mb[k][j + 8]), high);
            }
            _mm256_storeu_ps(&mc[i][j], low);
            _mm256_storeu_ps(&mc[i][j + 8], high);
        }
    }
}

__attribute__((noinline, target("avx2"))) static void mix(void)
{
    const __m256i order = _mm256_setr_epi32(3, 0, 5, 6, 1, 7, 2, 4);
    __m256i sum = _mm256_set1_epi32(1);
    for (size_t i = 0; i < sizeof lanes / sizeof *lanes; i += 8) {
        __m256i x = _mm256_loadu_si256((const __m256i *)&lanes[i]);
        __m256i at = _mm256_and_si256(x, _mm256_set1_epi32(8191));
        x = _mm256_add_epi32(x, _mm256_i32gather_epi32((const int *)lanes, at, 4));
        x = _mm256_xor_si256(_mm256_permutevar8x32_epi32(x, order), _mm256_srli_epi32(x, 7));
        x = _mm256_mullo_epi32(x, _mm256_or_si256(sum, _mm256_set1_epi32(1)));
        sum = _mm256_add_epi32(_mm256_shuffle_epi32(sum, 0x39), x);
        _mm256_storeu_si256((__m256i *)&lanes[i], x);
    }
}

static uint64_t avx2_pass(void)
{
    uint64_t random = 10, sum = CHECK_START;
    for (int i = 0; i < SIDE * SIDE; i++) {
        ma[i / SIDE][i % SIDE] = (float)(next_random(&random) >> 40) / (1 << 24);
        mb[i / SIDE][i % SIDE] = (float)(next_random(&random) >> 40) / (1 << 24);
    }
    for (size_t i = 0; i < sizeof lanes / sizeof *lanes; i++)
        lanes[i] = (uint32_t)next_random(&random);
    for (int i = 0; i < 200; i++) {
        multiply();
        mb[i % SIDE][0] = mc[0][i % SIDE] / 64;
        sum = check(sum, mc[i % SIDE], 64);
        for (int j = 0; j < 3; j++)
            mix();
    }
    return check(sum, lanes, sizeof lanes);
}

/* ---- aes: AES-128 in counter mode by the processor's AES instructions ---- */

__attribute__((target("aes,sse4.1"))) static __m128i next_key(__m128i key, __m128i assist)
{
    assist = _mm_shuffle_epi32(assist, 0xff);
    key = _mm_xor_si128(key, _mm_slli_si128(key, 4));
    key = _mm_xor_si128(key, _mm_slli_si128(key, 4));
    key = _mm_xor_si128(key, _mm_slli_si128(key, 4));
    return _mm_xor_si128(key, assist);
}

__attribute__((target("aes,sse4.1"))) static void expand(__m128i keys[11], __m128i key)
{
    keys[0] = key;
#define EXPAND(n, constant) keys[n] = next_key(keys[n - 1], _mm_aeskeygenassist_si128(keys[n - 1], constant))
    EXPAND(1, 0x01), EXPAND(2, 0x02), EXPAND(3, 0x04), EXPAND(4, 0x08), EXPAND(5, 0x10);
    EXPAND(6, 0x20), EXPAND(7, 0x40), EXPAND(8, 0x80), EXPAND(9, 0x1b), EXPAND(10, 0x36);
#undef EXPAND
}

__attribute__((target("aes,sse4.1"))) static __m128i encrypt(const __m128i keys[11], __m128i block)
{
    block = _mm_xor_si128(block, keys[0]);
    for (int round = 1; round < 10; round++)
        block = _mm_aesenc_si128(block, keys[round]);
    return _mm_aesenclast_si128(block, keys[10]);
}

__attribute__((target("aes,sse4.1"))) static void aes_prepare(void)
{
    /* FIPS 197, appendix C.1. */
    static const uint8_t expected[16] = {0x69, 0xc4, 0xe0, 0xd8, 0x6a, 0x7b, 0x04, 0x30, 0xd8, 0xcd, 0xb7, 0x80, 0x70, 0xb4, 0xc5, 0x5a};
    uint8_t key[16], text[16], result[16];
    __m128i keys[11];
    for (int i = 0; i < 16; i++) {
        key[i] = (uint8_t)i;
        text[i] = (uint8_t)(17 * i);
    }
    expand(keys, _mm_loadu_si128((const __m128i *)key));
    _mm_storeu_si128((__m128i *)result, encrypt(keys, _mm_loadu_si128((const __m128i *)text)));
    if (memcmp(result, expected, sizeof expected) != 0)
        fail("AES of the standard's example");
}

__attribute__((target("aes,sse4.1"))) static uint64_t aes_pass(void)
{
    static __m128i data[16384];
    __m128i keys[11];
    expand(keys, _mm_set_epi64x(0x0123456789abcdef, 0x0fedcba987654321));
    memset(data, 0x5a, sizeof data);
    uint64_t counter = 0;
    for (int round = 0; round < 200; round++) {
        for (size_t i = 0; i < sizeof data / sizeof *data; i += 4) {
            __m128i a = encrypt(keys, _mm_set_epi64x(1, (long long)counter++));
            __m128i b = encrypt(keys, _mm_set_epi64x(1, (long long)counter++));
            __m128i c = encrypt(keys, _mm_set_epi64x(1, (long long)counter++));
            __m128i d = encrypt(keys, _mm_set_epi64x(1, (long long)counter++));
            data[i] = _mm_xor_si128(data[i], a);
            data[i + 1] = _mm_xor_si128(data[i + 1], b);
            data[i + 2] = _mm_xor_si128(data[i + 2], c);
            data[i + 3] = _mm_xor_si128(data[i + 3], d);
        }
    }
    return check(CHECK_START, data, sizeof data / 8);
}

const struct workload vector_workloads[] = {
    {"float", 8, float_pass, NULL},
    {"double", 8, double_pass, NULL},
    {"x87", 8, x87_pass, NULL},
    {"avx2", 8, avx2_pass, NULL},
    {"aes", 8, aes_pass, aes_prepare},
    {0},
};
