// One pass of the online softmax over a block of logits; a warp for each line of it.
//
// REAL is float or double. Logits become weights relative to the largest logit so far;
// earlier sums shrink whenever a larger one comes. Line i of the block is row i % rows
// of its head and sees the keys before visible[i % rows], its prefix length; the
// block's first key is number `first`.

typedef REAL real;

constexpr int THREADS = 128;
constexpr int WARP = 32;

template <typename T>
__device__ T larger(T a, T b)
{
    return a > b ? a : b;
}

extern "C" __global__ __launch_bounds__(THREADS) void soften(
    real* __restrict__ logits, const long long* __restrict__ visible,
    real* __restrict__ peak, double* __restrict__ total, real* __restrict__ sums,
    long long lines, long long rows, long long keys, long long first, long long p)
{
    const int warp = threadIdx.x / WARP;
    const long long line = (long long)(blockIdx.x) * (THREADS / WARP) + warp;
    // a whole warp leaves, and no barrier of the block follows
    if (line >= lines) {
        return;
    }
    const int lane = threadIdx.x % WARP;
    const long long count = min(visible[line % rows] - first, keys);
    real* row = logits + line * keys;
    const real before = peak[line];
    real largest = before;
    for (long long j = lane; j < count; j += WARP) {
        largest = larger(largest, row[j]);
    }
    for (int step = WARP / 2; step > 0; step /= 2) {
        largest = larger(largest, __shfl_xor_sync(0xffffffffu, largest, step));
    }
    real partial = 0;
    for (long long j = lane; j < keys; j += WARP) {
        const real weight = j < count ? exp(row[j] - largest) : real(0);
        row[j] = weight;
        partial += weight;
    }
    double whole = partial;
    for (int step = WARP / 2; step > 0; step /= 2) {
        whole += __shfl_xor_sync(0xffffffffu, whole, step);
    }
    // equal peaks may both be minus infinity
    const real shrink = largest > before ? exp(before - largest) : real(1);
    if (lane == 0) {
        peak[line] = largest;
        total[line] = total[line] * shrink + whole;
    }
    if (largest > before) {
        for (long long c = lane; c < p; c += WARP) {
            sums[line * p + c] *= shrink;
        }
    }
}
