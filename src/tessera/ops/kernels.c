/* The pull of a quadratic, w (theta - c), in one pass over memory.
 *
 * Compiled with -ffp-contract=off: every operation rounds as it does in PyTorch's sub, mul and
 * add, so gradients have the same bits whether or not this file could be compiled.
 */
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
