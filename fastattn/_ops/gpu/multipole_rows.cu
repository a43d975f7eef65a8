// Summaries of parts of the keys: a block of threads for each part.
//
// REAL is float or double.

#include "tiles.cuh"

// the sum over the threads of a block, which all threads get
__device__ real block_sum(real* shared, real x)
{
    shared[threadIdx.x] = x;
    __syncthreads();
    for (int half = THREADS / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) {
            shared[threadIdx.x] += shared[threadIdx.x + half];
        }
        __syncthreads();
    }
    const real sum = shared[0];
    __syncthreads();
    return sum;
}

// mean of a column of `size` rows, and the sum of the squared deviations from it
__device__ real column_mean(
    const real* column, long long stride, long long size, real& squares)
{
    real mean = 0;
    for (long long j = 0; j < size; ++j) {
        mean += column[j * stride];
    }
    mean /= size;
    for (long long j = 0; j < size; ++j) {
        squares += (column[j * stride] - mean) * (column[j * stride] - mean);
    }
    return mean;
}

// Row c of parts, (parts, 3 d + p + 3), is about the keys start[c] to start[c + 1] - 1.
// `along`, a number for each key, is scratch memory: the coordinate along the direction
// that the power iteration finds in `steps`.
extern "C" __global__ __launch_bounds__(THREADS, BLOCKS) void summarise(
    const real* __restrict__ key, const real* __restrict__ value,
    const real* __restrict__ middle, const long long* __restrict__ start,
    real* __restrict__ parts, real* __restrict__ along, long long d, long long p,
    long long steps, real tiny)
{
    __shared__ real shared[THREADS];
    const int thread = threadIdx.x;
    const long long first = start[blockIdx.x], size = start[blockIdx.x + 1] - first;
    real* centre = parts + blockIdx.x * (3 * d + p + 3);
    real *lead = centre + d, *rest = centre + 2 * d, *mean = centre + 3 * d;
    real* sizes = mean + p;
    key += first * d;
    value += first * p;
    along += first;
    for (long long l = thread; l < d; l += THREADS) {
        real squares = 0;
        centre[l] = column_mean(key + l, d, size, squares);
        rest[l] = squares / size;
    }
    real spread = 0, apart = 0;
    for (long long l = thread; l < p; l += THREADS) {
        mean[l] = column_mean(value + l, p, size, spread);
        apart += (mean[l] - middle[l]) * (mean[l] - middle[l]);
    }
    // the barriers within also order the reads of `centre` and `rest`
    spread = block_sum(shared, spread);
    apart = block_sum(shared, apart);
    long long widest = 0;
    for (long long l = 1; l < d; ++l) {
        widest = rest[l] > rest[widest] ? l : widest;
    }
    for (long long j = thread; j < size; j += THREADS) {
        along[j] = key[j * d + widest] - centre[widest];
    }
    __syncthreads();
    real square = 0;
    for (long long step = 0; step < steps; ++step) {
        real length = 0;
        for (long long l = thread; l < d; l += THREADS) {
            real sum = 0;
            for (long long j = 0; j < size; ++j) {
                sum += along[j] * (key[j * d + l] - centre[l]);
            }
            lead[l] = sum;
            length += sum * sum;
        }
        const real scale = 1 / (sqrt(block_sum(shared, length)) + tiny);
        square = 0;
        for (long long j = thread; j < size; j += THREADS) {
            real sum = 0;
            for (long long l = 0; l < d; ++l) {
                sum += lead[l] * (key[j * d + l] - centre[l]);
            }
            along[j] = sum * scale;
            square += along[j] * along[j];
        }
        square = block_sum(shared, square);
        for (long long l = thread; l < d; l += THREADS) {
            lead[l] *= scale;
        }
    }
    const real deviation = sqrt(square / size);
    for (long long l = thread; l < d; l += THREADS) {
        lead[l] *= deviation;
        rest[l] = larger(rest[l] - lead[l] * lead[l], 0);
    }
    if (thread == 0) {
        sizes[0] = sqrt(spread / size);
        sizes[1] = sqrt(apart);
        sizes[2] = log(real(size));
    }
}
