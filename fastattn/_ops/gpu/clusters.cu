// Means of parts of the rows of a matrix.
//
// REAL is float or double.

typedef REAL real;

constexpr int THREADS = 128;

// Part c is the rows order[start[c]] to order[start[c + 1] - 1]: a block for each, a
// thread for some columns.
extern "C" __global__ __launch_bounds__(THREADS) void part_means(
    const real* __restrict__ x, const long long* __restrict__ order,
    const long long* __restrict__ start, real* __restrict__ mean, long long d)
{
    const long long c = blockIdx.x, lo = start[c], hi = start[c + 1];
    for (long long l = threadIdx.x; l < d; l += THREADS) {
        real sum = 0;
        for (long long i = lo; i < hi; ++i) {
            sum += x[order[i] * d + l];
        }
        mean[c * d + l] = sum / (hi - lo);
    }
}
