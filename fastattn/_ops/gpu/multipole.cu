// Weights of keys, near and first-order keys, and moments, as blocks of queries see
// them.
//
// REAL is float or double. Cluster c is the keys start[c] to start[c + 1] - 1; arrays
// of blocks and keys are (blocks, keys), of blocks and clusters (blocks, clusters).

#include "tiles.cuh"

constexpr int WARP = 32;
// blocks of queries that share one pass over a cluster's keys
constexpr int SHARED = 8;

template <typename T>
__device__ T warp_sum(T x)
{
    for (int step = WARP / 2; step > 0; step /= 2) {
        x += __shfl_xor_sync(0xffffffffu, x, step);
    }
    return x;
}

// Mean and mean square deviation of each block's rows, and the deviations of a few:
// a block for each, a thread for some coordinates.
extern "C" __global__ __launch_bounds__(THREADS, BLOCKS) void describe(
    const real* __restrict__ query, const long long* __restrict__ cuts,
    real* __restrict__ mean, real* __restrict__ square, real* __restrict__ probe,
    long long d, long long rows)
{
    const long long r = blockIdx.x, lo = cuts[r], size = cuts[r + 1] - lo;
    for (long long l = threadIdx.x; l < d; l += THREADS) {
        real sum = 0;
        for (long long i = 0; i < size; ++i) {
            sum += query[(lo + i) * d + l];
        }
        const real middle = sum / size;
        sum = 0;
        for (long long i = 0; i < size; ++i) {
            const real step = query[(lo + i) * d + l] - middle;
            sum += step * step;
        }
        mean[r * d + l] = middle;
        square[r * d + l] = sum / size;
        for (long long i = 0; i < rows; ++i) {
            const long long row = lo + i * size / rows;
            probe[(r * rows + i) * d + l] = query[row * d + l] - middle;
        }
    }
}

// Logits become weights relative to the largest of a cluster; `mass` are their sums. A
// warp for each cluster; blocks: clusters, blocks of queries.
extern "C" __global__ __launch_bounds__(THREADS, BLOCKS) void tilt(
    real* __restrict__ weight, const long long* __restrict__ start,
    real* __restrict__ mass, real* __restrict__ top, long long keys,
    long long clusters)
{
    const long long c = 1ll * blockIdx.x * (THREADS / WARP) + threadIdx.x / WARP;
    // a whole warp leaves, and no barrier of the block follows
    if (c >= clusters) {
        return;
    }
    const int lane = threadIdx.x % WARP;
    const long long lo = start[c], hi = start[c + 1];
    real* row = weight + blockIdx.y * keys;
    real largest = row[lo];
    for (long long j = lo + lane; j < hi; j += WARP) {
        largest = larger(largest, row[j]);
    }
    for (int step = WARP / 2; step > 0; step /= 2) {
        largest = larger(largest, __shfl_xor_sync(0xffffffffu, largest, step));
    }
    real sum = 0;
    for (long long j = lo + lane; j < hi; j += WARP) {
        row[j] = exp(row[j] - largest);
        sum += row[j];
    }
    sum = warp_sum(sum);
    if (lane == 0) {
        mass[blockIdx.y * clusters + c] = sum;
        top[blockIdx.y * clusters + c] = largest;
    }
}

// Kinds of keys: 2 near, whose weight becomes 0, 1 first order, 0 far. Of each cluster
// the remaining weight, that of first-order keys, the sum of the squared remainders,
// and the numbers of near and of first-order keys. Warps and blocks as above.
extern "C" __global__ __launch_bounds__(THREADS, BLOCKS) void classify(
    real* __restrict__ weight, const real* __restrict__ square,
    const real* __restrict__ growth, const long long* __restrict__ start,
    signed char* __restrict__ kind, real* __restrict__ total, real* __restrict__ own,
    real* __restrict__ error, long long* __restrict__ nears,
    long long* __restrict__ middles, long long keys, long long clusters, real near,
    real middle, real alike, real bend, real largest)
{
    const long long c = 1ll * blockIdx.x * (THREADS / WARP) + threadIdx.x / WARP;
    if (c >= clusters) {
        return;
    }
    const int lane = threadIdx.x % WARP;
    const long long hi = start[c + 1], place = blockIdx.y * clusters + c;
    const real share = growth[place];
    real left = 0, half = 0, rest = 0, squares = 0;
    int close = 0, between = 0;
    for (long long j = start[c] + lane; j < hi; j += WARP) {
        const long long at = blockIdx.y * keys + j;
        const real z = square[at] < largest ? square[at] : largest;
        const real w = weight[at], missed = w * z * exp(bend * z);
        const real remainder = share * missed;
        const bool is_near = remainder > near;
        const bool is_middle = !is_near && remainder > middle;
        kind[at] = is_near ? 2 : is_middle ? 1 : 0;
        close += is_near;
        between += is_middle;
        half += is_middle ? w : real(0);
        if (is_near) {
            weight[at] = 0;
        } else {
            left += w;
            rest += missed;
            squares += missed * missed;
        }
    }
    left = warp_sum(left);
    half = warp_sum(half);
    rest = warp_sum(rest);
    squares = warp_sum(squares);
    close = warp_sum(close);
    between = warp_sum(between);
    if (lane == 0) {
        total[place] = left;
        own[place] = half;
        error[place] = squares + alike * rest * rest;
        nears[place] = close;
        middles[place] = between;
    }
}

// Weighted mean and variance of each cluster's keys about its centre, and mean of its
// values. A thread for a coordinate or a column of values; blocks: clusters, some
// blocks of queries.
extern "C" __global__ __launch_bounds__(THREADS, BLOCKS) void field_moments(
    const real* __restrict__ weight, const real* __restrict__ local,
    const real* __restrict__ value, const long long* __restrict__ start,
    const real* __restrict__ total, real* __restrict__ shift,
    real* __restrict__ variance, real* __restrict__ average, long long blocks,
    long long keys, long long clusters, long long d, long long p)
{
    const long long c = blockIdx.x, first = 1ll * SHARED * blockIdx.y;
    const int count = int(min(blocks - first, 1ll * SHARED));
    for (long long l = threadIdx.x; l < d + p; l += THREADS) {
        const bool is_key = l < d;
        const real* column = is_key ? local + l : value + (l - d);
        const long long stride = is_key ? d : p;
        real once[SHARED] = {}, twice[SHARED] = {};
        for (long long j = start[c]; j < start[c + 1]; ++j) {
            const real x = column[j * stride];
#pragma unroll
            for (int s = 0; s < SHARED; ++s) {
                const real y = s < count ? weight[(first + s) * keys + j] * x : real(0);
                once[s] += y;
                twice[s] += y * x;
            }
        }
#pragma unroll
        for (int s = 0; s < SHARED; ++s) {
            if (s >= count) {
                continue;
            }
            const long long place = (first + s) * clusters + c;
            const real whole = total[place] > 0 ? total[place] : real(1);
            const real mean = once[s] / whole;
            if (is_key) {
                shift[place * d + l] = mean;
                variance[place * d + l] = larger(twice[s] / whole - mean * mean, 0);
            } else {
                average[place * p + l - d] = mean;
            }
        }
    }
}

// First moments of first-order keys with values, by groups of clusters: (blocks,
// groups, d, p). Block r's list of keys of cluster c is list[bounds[r * clusters + c]]
// on. Blocks: tiles of coordinates, tiles of values, blocks of queries and groups.
extern "C" __global__ __launch_bounds__(THREADS, BLOCKS) void first_moments(
    const real* __restrict__ weight, const real* __restrict__ local,
    const real* __restrict__ value, const real* __restrict__ common,
    const real* __restrict__ shift, const real* __restrict__ average,
    const long long* __restrict__ list, const long long* __restrict__ bounds,
    const long long* __restrict__ label, const long long* __restrict__ groups,
    real* __restrict__ moment, long long count, long long keys, long long clusters,
    long long d, long long p)
{
    __shared__ __align__(16) Tile left;
    __shared__ __align__(16) Tile right;
    const long long r = blockIdx.z / count, g = blockIdx.z % count;
    const long long row = 1ll * TILE * blockIdx.x, column = 1ll * TILE * blockIdx.y;
    const long long end = bounds[r * clusters + groups[g + 1]];
    real sum[UP][ACROSS] = {};
    for (long long lo = bounds[r * clusters + groups[g]]; lo < end; lo += DEPTH) {
        for (int t = threadIdx.x; t < DEPTH * TILE; t += THREADS) {
            const int k = t / TILE, l = t % TILE;
            real one = 0, other = 0;
            if (lo + k < end) {
                const long long j = list[lo + k], place = r * clusters + label[j];
                if (row + l < d) {
                    one = local[j * d + row + l] - shift[place * d + row + l];
                    one *= weight[r * keys + j] * common[place];
                }
                if (column + l < p) {
                    other = value[j * p + column + l] - average[place * p + column + l];
                }
            }
            left[k][l] = one;
            right[k][l] = other;
        }
        __syncthreads();
        accumulate(sum, left, right);
        __syncthreads();
    }
    store(moment + blockIdx.z * d * p, p, sum, row, d, column, p);
}
