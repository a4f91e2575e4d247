// Products of few tokens with 4-bit codes where they lie, and weights from codes for products of many, for processors
// with AVX-512.
//
//   y[t, o] = sum over groups g of scale[o, g] * (sum over j in g of book[code[o, j]] * x[t, j] - zero[o, g] * sum[t, g])
//
// Codes lie two to a byte, even ones in the low half. Looking 16 codes up in the book is one instruction, which reads
// the low four bits of every lane, so that even codes need no mask. x comes with the even and the odd channels of every
// 32 apart, to meet the codes in their order. Everything is computed in float32.

#include <immintrin.h>
#include <stdint.h>

enum { BLOCK = 32, TOKENS = 4, ROWS = 2, CHUNK = 64 };

typedef struct {
    const float *x;          // (n, columns): columns are a multiple of the group
    const float *sums;       // (n, groups)
    const uint8_t *codes;    // (d_out, bytes): perhaps fewer than half of columns
    const uint16_t *scales;  // (d_out, groups), float16
    const uint8_t *zeros;    // (d_out, groups) or none
    const float *book;       // 16
    float *y;                // (n, d_out)
    int64_t columns, bytes, group, d_out;
} Work;

// n tokens from the first on with m rows, both constants of the caller's: their sums then stay in registers.
static inline __attribute__((always_inline)) void few_rows(const Work *w, int64_t first, int n, int64_t row, int m)
{
    const __m512 values = _mm512_loadu_ps(w->book);
    const int64_t groups = w->columns / w->group, blocks = w->group / BLOCK;
    const float *x = w->x + first * w->columns, *sums = w->sums + first * groups;
    __m512 total[TOKENS][ROWS];
    float corrections[TOKENS][ROWS] = {{0}};
    for (int t = 0; t < n; t++)
        for (int r = 0; r < m; r++) total[t][r] = _mm512_setzero_ps();
    for (int64_t g = 0; g < groups; g++) {
        __m512 even[TOKENS][ROWS], odd[TOKENS][ROWS];
        for (int t = 0; t < n; t++)
            for (int r = 0; r < m; r++) even[t][r] = odd[t][r] = _mm512_setzero_ps();
        for (int64_t b = g * blocks; b < (g + 1) * blocks; b++) {
            const int64_t at = b * (BLOCK / 2), left = w->bytes - at;
            if (left <= 0) break;
            const __mmask16 there = left >= 16 ? 0xFFFF : (1u << left) - 1;
            for (int r = 0; r < m; r++) {
                const __m128i bytes = _mm_maskz_loadu_epi8(there, w->codes + (row + r) * w->bytes + at);
                const __m512i words = _mm512_cvtepu8_epi32(bytes);
                const __m512 low = _mm512_permutexvar_ps(words, values);
                const __m512 high = _mm512_permutexvar_ps(_mm512_srli_epi32(words, 4), values);
                for (int t = 0; t < n; t++) {
                    const float *token = x + t * w->columns + 2 * at;
                    even[t][r] = _mm512_fmadd_ps(low, _mm512_loadu_ps(token), even[t][r]);
                    odd[t][r] = _mm512_fmadd_ps(high, _mm512_loadu_ps(token + 16), odd[t][r]);
                }
            }
        }
        for (int r = 0; r < m; r++) {
            const int64_t at = (row + r) * groups + g;
            const float scale = _cvtsh_ss(w->scales[at]);
            for (int t = 0; t < n; t++) {
                const __m512 sum = _mm512_add_ps(even[t][r], odd[t][r]);
                total[t][r] = _mm512_fmadd_ps(_mm512_set1_ps(scale), sum, total[t][r]);
                if (w->zeros) corrections[t][r] += scale * w->zeros[at] * sums[t * groups + g];
            }
        }
    }
    for (int t = 0; t < n; t++)
        for (int r = 0; r < m; r++)
            w->y[(first + t) * w->d_out + row + r] = _mm512_reduce_add_ps(total[t][r]) - corrections[t][r];
}

static inline __attribute__((always_inline)) void rows_of(const Work *w, int64_t first, int n, int64_t from, int64_t to)
{
    for (; from + ROWS <= to; from += ROWS) few_rows(w, first, n, from, ROWS);
    for (; from < to; from++) few_rows(w, first, n, from, 1);
}

void product(
    int64_t n, const float *x, const float *sums, const uint8_t *codes, const uint16_t *scales, const uint8_t *zeros,
    const float *book, float *y, int64_t columns, int64_t bytes, int64_t group, int64_t d_out)
{
    const Work work = {x, sums, codes, scales, zeros, book, y, columns, bytes, group, d_out}, *w = &work;
    #pragma omp parallel for schedule(static)
    for (int64_t from = 0; from < d_out; from += CHUNK) {
        const int64_t to = from + CHUNK < d_out ? from + CHUNK : d_out;
        for (int64_t first = 0; first < n; first += TOKENS) {
            switch (n - first) {
            case 1: rows_of(w, first, 1, from, to); break;
            case 2: rows_of(w, first, 2, from, to); break;
            case 3: rows_of(w, first, 3, from, to); break;
            default: rows_of(w, first, TOKENS, from, to);
            }
        }
    }
}

// The values of codes of up to 4 bits, or of signed bytes, as bfloat16: (book[code] - zero) * scale, computed in float32
// and rounded once. 16 codes are at most 8 bytes: all of these go to every lane, and each lane shifts its own code to
// the lowest bits. The book is repeated to 16 values, so that what lies above the code does not matter.
void decode(
    const uint8_t *codes, const float *scales, const uint8_t *zeros, const float *book, uint16_t *values,
    int64_t bits, int64_t columns, int64_t bytes, int64_t group, int64_t groups, int64_t d_out)
{
    const __m512 table = _mm512_loadu_ps(book);
    const __m512i lanes = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7), one = _mm512_set1_epi32(1);
    const __m512i first = _mm512_mul_epu32(lanes, _mm512_set1_epi64(bits));
    const __m512i second = _mm512_add_epi64(first, _mm512_set1_epi64(8 * bits));
    #pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < d_out; row++) {
        const uint8_t *from = codes + row * bytes;
        for (int64_t g = 0, j = 0; g < groups; g++) {
            const __m512 scale = _mm512_set1_ps(scales[row * groups + g]);
            const __m512 zero = _mm512_set1_ps(zeros ? zeros[row * groups + g] : 0);
            const int64_t end = (g + 1) * group < columns ? (g + 1) * group : columns;
            for (; j < end; j += 16) {
                const int64_t at = j * bits / 8, left = bytes - at, need = 2 * bits;
                const int64_t n = left < need ? left : need;
                const __m128i read = _mm_maskz_loadu_epi8((1u << n) - 1, from + at);
                __m512 value;
                if (bits == 8) {
                    value = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(read));
                } else {
                    const __m512i all = _mm512_broadcastq_epi64(read);
                    const __m256i low = _mm512_cvtepi64_epi32(_mm512_srlv_epi64(all, first));
                    const __m256i high = _mm512_cvtepi64_epi32(_mm512_srlv_epi64(all, second));
                    const __m512i words = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
                    value = _mm512_permutexvar_ps(words, table);
                }
                value = _mm512_mul_ps(_mm512_sub_ps(value, zero), scale);
                __m512i word = _mm512_castps_si512(value);  // to the nearest bfloat16, ties to the even one
                const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(word, 16), one);
                word = _mm512_add_epi32(word, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
                const __m256i half = _mm512_cvtepi32_epi16(_mm512_srli_epi32(word, 16));
                const __mmask16 there = end - j >= 16 ? 0xFFFF : (1u << (end - j)) - 1;
                _mm256_mask_storeu_epi16(values + row * columns + j, there, half);
            }
        }
    }
}
