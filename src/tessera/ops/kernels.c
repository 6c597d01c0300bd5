/* The pull of a quadratic, w (theta - c), in one pass over memory; the sums that rows are drawn from
 * by priority; and a projection.
 *
 * Compiled with -ffp-contract=off: every operation of the pulls rounds as it does in PyTorch's sub,
 * mul and add, so gradients have the same bits whether or not this file could be compiled.
 */
#include <math.h>
#include <stdint.h>

/* grad += w (theta - c), for each of `count` tensors */
void tessera_add_pulls(float *const *grad, const float *const *theta, const float *const *c,
                       const float *const *w, const int64_t *n, int64_t count)
{
    for (int64_t t = 0; t < count; t++) {
        float *restrict g = grad[t];
        const float *restrict p = theta[t], *restrict ct = c[t], *restrict wt = w[t];
        for (int64_t i = 0; i < n[t]; i++)
            g[i] += wt[i] * (p[i] - ct[i]);
    }
}

/* theta -= lr (grad + w (theta - c)), for each of `count` tensors. PyTorch's SGD multiplies and adds
 * with one rounding, so this does. */
void tessera_sgd_pulls(const float *const *grad, float *const *theta, const float *const *c,
                       const float *const *w, const int64_t *n, int64_t count, float lr)
{
    for (int64_t t = 0; t < count; t++) {
        float *restrict p = theta[t];
        const float *restrict g = grad[t], *restrict ct = c[t], *restrict wt = w[t];
        for (int64_t i = 0; i < n[t]; i++) {
            float pulled = g[i] + wt[i] * (p[i] - ct[i]);
            p[i] = __builtin_fmaf(-lr, pulled, p[i]);
        }
    }
}

/* Adam's step on grad + w (theta - c), rounding where PyTorch's fused Adam does: in vectors of eight
 * the mean of squares is added up in one order, in what is left over in the other. */
static void adam(const float *restrict g, float *restrict p, const float *restrict c,
                 const float *restrict w, float *restrict m, float *restrict v, int64_t n,
                 float rate, float root, float one_beta1, float beta2, float one_beta2, float eps)
{
    int64_t even = n / 8 * 8;
    for (int64_t i = 0; i < n; i++) {
        float pulled = g[i] + w[i] * (p[i] - c[i]);
        m[i] = __builtin_fmaf(one_beta1, pulled - m[i], m[i]);
        float squared = one_beta2 * pulled;
        v[i] = i < even ? __builtin_fmaf(squared, pulled, v[i] * beta2)
                        : __builtin_fmaf(v[i], beta2, squared * pulled);
        p[i] -= rate * m[i] / (sqrtf(v[i]) / root + eps);
    }
}

/* For each of `count` tensors; rate = lr / (1 - beta1^t), root = sqrt(1 - beta2^t). */
void tessera_adam_pulls(const float *const *grad, float *const *theta, const float *const *c,
                        const float *const *w, const int64_t *n, int64_t count,
                        float *const *mean, float *const *square, const float *rate,
                        const float *root, float one_beta1, float beta2, float one_beta2,
                        float eps)
{
    for (int64_t t = 0; t < count; t++)
        adam(grad[t], theta[t], c[t], w[t], mean[t], square[t], n[t], rate[t], root[t], one_beta1,
             beta2, one_beta2, eps);
}

/* out = w (theta - c); returns sum w (theta - c)^2: 16 float lanes over 1024 elements, doubles
 * across, so 50 M elements are right to 1e-6. */
static double pull(float *restrict out, const float *restrict theta, const float *restrict c,
                   const float *restrict w, int64_t n)
{
    double total = 0;
    for (int64_t begin = 0; begin < n; begin += 1024) {
        int64_t end = begin + 1024 < n ? begin + 1024 : n, i = begin;
        float lanes[16] = {0};
        for (; i + 16 <= end; i += 16)
            for (int k = 0; k < 16; k++) {
                float gap = theta[i + k] - c[i + k];
                out[i + k] = w[i + k] * gap;
                lanes[k] += out[i + k] * gap;
            }
        for (; i < end; i++) {
            float gap = theta[i] - c[i];
            out[i] = w[i] * gap;
            lanes[0] += out[i] * gap;
        }
        for (int k = 0; k < 16; k++)
            total += lanes[k];
    }
    return total;
}

/* The same for each of `count` tensors; returns the sum over all. */
double tessera_pulls(float *const *out, const float *const *theta, const float *const *c,
                     const float *const *w, const int64_t *n, int64_t count)
{
    double total = 0;
    for (int64_t t = 0; t < count; t++)
        total += pull(out[t], theta[t], c[t], w[t], n[t]);
    return total;
}

/* What data.priorities.BlockSums does, to the same bits. levels[0] holds weights, every level above
 * the sums of 64 neighbours. */
enum { BLOCK = 64 };

/* The order in which numpy adds up 64 doubles. */
static double block_sum(const double *w)
{
    double s[8];
    for (int k = 0; k < 8; k++)
        s[k] = w[k];
    for (int i = 8; i < BLOCK; i += 8)
        for (int k = 0; k < 8; k++)
            s[k] += w[i + k];
    return ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]));
}

/* The sums above n of `size` places; all of a level, where they are fewer. */
static void sum_above(double *const *levels, int64_t depth, int64_t size, const int64_t *places,
                      int64_t n)
{
    for (int64_t d = 1, width = BLOCK; d < depth; d++, width *= BLOCK) {
        int64_t done = -1, blocks = (size + width - 1) / width;
        if (blocks <= n) {
            for (int64_t at = 0; at < blocks; at++)
                levels[d][at] = block_sum(levels[d - 1] + at * BLOCK);
            continue;
        }
        for (int64_t i = 0; i < n; i++) {
            int64_t at = places[i] / width;
            if (at != done)
                levels[d][at] = block_sum(levels[d - 1] + at * BLOCK);
            done = at;
        }
    }
}

static void fetch(const double *weights, int64_t place)
{
    for (int64_t line = 0; line < BLOCK; line += 8)
        __builtin_prefetch(weights + place / BLOCK * BLOCK + line);
}

/* Set the weights of n places of `size`; 0, and nothing is done, if there is no such place. */
int64_t tessera_put_weights(double *const *levels, int64_t depth, int64_t size,
                            const int64_t *places, const double *weights, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        if ((uint64_t)places[i] >= (uint64_t)size)
            return 0;
    for (int64_t i = 0; i < n; i++)
        levels[0][places[i]] = weights[i];
    sum_above(levels, depth, size, places, n);
    return 1;
}

/* The same for rows of a ring of `capacity`, by their stream positions; rows that have left it are
 * passed over. How many were set, and the largest weight given; -1, and nothing is done, if a
 * position is not below `seen` or a weight not finite and > 0. */
int64_t tessera_put_ring(double *const *levels, int64_t depth, int64_t capacity, int64_t seen,
                         const int64_t *positions, const double *weights, int64_t n,
                         double *largest)
{
    enum { MANY = 256 };
    int64_t oldest = seen > capacity ? seen - capacity : 0, first = oldest % capacity, count = 0;
    for (int64_t i = 0; i < n; i++)
        if (positions[i] < 0 || positions[i] >= seen || !(weights[i] > 0 && weights[i] < INFINITY))
            return -1;
    *largest = 0;
    for (int64_t i = 0; i < n; i++)
        *largest = weights[i] > *largest ? weights[i] : *largest;
    for (int64_t begin = 0; begin < n; begin += MANY) {
        int64_t places[MANY], m = 0, end = begin + MANY < n ? begin + MANY : n;
        for (int64_t i = begin; i < end; i++) {
            int64_t place = positions[i] - oldest + first;
            if (place < first)
                continue;
            places[m] = place < capacity ? place : place - capacity;
            levels[0][places[m]] = weights[i];
            fetch(levels[0], places[m++]);
        }
        sum_above(levels, depth, capacity, places, m);
        count += m;
    }
    return count;
}

/* For each of n masses the place at which the running sum of weights exceeds it; the masses are
 * used up. Level by level, so that the blocks of one mass come from memory during the others. */
void tessera_find_masses(const double *const *levels, int64_t depth, double *masses,
                         int64_t *places, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        places[i] = 0;
    for (int64_t d = depth - 1; d >= 0; d--)
        for (int64_t i = 0; i < n; i++) {
            const double *block = levels[d] + places[i] * BLOCK;
            double rest = masses[i], running = block[0];
            int64_t k = 0;
            while (!(running > rest) && ++k < BLOCK)
                running += block[k];
            if (k == BLOCK)
                for (k = BLOCK - 1; k > 0 && !(block[k] > 0);)
                    k--;
            rest -= running - block[k];
            masses[i] = rest > 0 ? rest : 0;
            places[i] = places[i] * BLOCK + k;
            if (d)
                fetch(levels[d - 1], places[i] * BLOCK);
        }
}

/* From here on a multiplication and an addition may round once: what follows is compared with
 * PyTorch by its error, not by its bits. */
#if defined(__clang__)
#pragma clang fp contract(fast)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=fast")
#endif

enum { TILE = 256 };
typedef float v8 __attribute__((vector_size(32), aligned(4), may_alias));
#define V8(p) (*(v8 *)(p))
#define INLINE static inline __attribute__((always_inline))

/* c[r][k] += sum_i u[r][i] m[i][k], for `rows` <= 4 rows and 8 `wide` <= 24 columns k. Twelve sums,
 * three of m and one of u fill the sixteen registers of AVX2. */
INLINE void strip(int rows, int wide, float *c, const float *u, const float *m, int64_t size,
                  int64_t rank)
{
    v8 s[4][3];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < wide; v++)
            s[r][v] = V8(c + r * rank + 8 * v);
    for (int64_t i = 0; i < size; i++)
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < wide; v++)
                s[r][v] += u[r * TILE + i] * V8(m + i * rank + 8 * v);
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < wide; v++)
            V8(c + r * rank + 8 * v) = s[r][v];
}

/* c += (after - before) m; after, before [rows, size], m [size, rank], c [rows, rank]. The tile of m
 * stays in the first cache for all rows. */
static void along(float *c, const float *after, const float *before, const float *m, int64_t rows,
                  int64_t size, int64_t rank)
{
    float u[4 * TILE];
    for (int64_t i = 0; i < size; i += TILE) {
        int64_t n = size - i < TILE ? size - i : TILE;
        for (int64_t r = 0; r < rows; r += 4) {
            int64_t some = rows - r < 4 ? rows - r : 4;
            for (int64_t q = 0; q < some; q++)
                for (int64_t j = 0, at = (r + q) * size + i; j < n; j++)
                    u[q * TILE + j] = after[at + j] - before[at + j];
            for (int64_t k = 0; k < rank; k += 24) {
                int64_t wide = rank - k < 24 ? (rank - k) / 8 : 3;
                const float *mk = m + i * rank + k;
                float *ck = c + r * rank + k;
                if (some == 4 && wide == 3)
                    strip(4, 3, ck, u, mk, n, rank);
                else if (some == 4 && wide == 2)
                    strip(4, 2, ck, u, mk, n, rank);
                else if (some == 4)
                    strip(4, 1, ck, u, mk, n, rank);
                else
                    for (int64_t q = 0; q < some; q++)
                        for (int64_t v = 0; v < wide; v++)
                            strip(1, 1, ck + q * rank + 8 * v, u + q * TILE, mk + 8 * v, n, rank);
            }
        }
    }
}

enum { WIDE = 64 };

/* w -= c m^T; w [rows, size], c [rows, rank], m [size, rank]. WIDE rows of m at a time are turned
 * into t [rank, WIDE], once for all rows of w. */
static void take(float *w, const float *c, const float *m, float *t, int64_t rows, int64_t size,
                 int64_t rank)
{
    int64_t even = size / 16 * 16;
    for (int64_t begin = 0; begin < even; begin += WIDE) {
        int64_t n = even - begin < WIDE ? even - begin : WIDE;
        for (int64_t j = 0; j < n; j++)
            for (int64_t k = 0; k < rank; k++)
                t[WIDE * k + j] = m[(begin + j) * rank + k];
        for (int64_t r = 0; r < rows; r += 4)
            for (int64_t i = 0; i < n; i += 16) {
                /* Rows past the last are the last again; all are written from the same sums. */
                float *to[4];
                const float *from[4];
                v8 a[4], b[4];
                for (int q = 0; q < 4; q++) {
                    int64_t row = r + q < rows ? r + q : rows - 1;
                    to[q] = w + row * size + begin + i, from[q] = c + row * rank;
                    a[q] = V8(to[q]), b[q] = V8(to[q] + 8);
                }
                for (int64_t k = 0; k < rank; k++) {
                    v8 x = V8(t + WIDE * k + i), y = V8(t + WIDE * k + i + 8);
                    for (int q = 0; q < 4; q++)
                        a[q] -= from[q][k] * x, b[q] -= from[q][k] * y;
                }
                for (int q = 0; q < 4; q++)
                    V8(to[q]) = a[q], V8(to[q] + 8) = b[q];
            }
    }
    for (int64_t i = even; i < size; i++)
        for (int64_t r = 0; r < rows; r++) {
            float s = 0;
            for (int64_t k = 0; k < rank; k++)
                s += c[r * rank + k] * m[i * rank + k];
            w[r * size + i] -= s;
        }
}

/* Take U M M^T out of an update U = [w - w_before, b - b_before] of a layer: w [rows, size], b [rows]
 * or 0, m [size, rank], or [size + 1, rank] with b; rank a multiple of 8; scratch
 * [rows + 64, rank]. */
void tessera_project(float *w, const float *w_before, float *b, const float *b_before,
                     const float *m, float *scratch, int64_t rows, int64_t size, int64_t rank)
{
    float *c = scratch, *t = scratch + rows * rank;
    for (int64_t i = 0; i < rows * rank; i++)
        c[i] = 0;
    along(c, w, w_before, m, rows, size, rank);
    if (b) {
        along(c, b, b_before, m + size * rank, rows, 1, rank);
        take(b, c, m + size * rank, t, rows, 1, rank);
    }
    take(w, c, m, t, rows, size, rank);
}
