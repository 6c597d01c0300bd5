/* The pull of a quadratic, w (theta - c), in one pass over memory.
 *
 * Compiled with -ffp-contract=off: every operation rounds as it does in PyTorch's sub, mul and
 * add, so gradients have the same bits whether or not this file could be compiled.
 */
#include <stdint.h>

/* grad += w (theta - c) */
void tessera_add_pull(float *restrict grad, const float *restrict theta, const float *restrict c,
                      const float *restrict w, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        grad[i] += w[i] * (theta[i] - c[i]);
}

/* out = w (theta - c); returns sum w (theta - c)^2: 16 float lanes over 1024 elements, doubles
 * across, so 50 M elements are right to 1e-6. */
double tessera_pull(float *restrict out, const float *restrict theta, const float *restrict c,
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
