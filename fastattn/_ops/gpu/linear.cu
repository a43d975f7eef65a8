// Feature maps of rows, and causal products by chunks of rows.
//
// REAL is float or double. Chunk c of the rows sees the keys before edge[c] by their
// state, and later ones one by one. A key fades by exp(rate * gap) until a row that is
// `gap` positions ahead of it.

#include "tiles.cuh"

extern "C" __global__ __launch_bounds__(THREADS, BLOCKS) void elu_plus_one(
    const real* __restrict__ x, real* __restrict__ out, long long size)
{
    const long long stride = 1ll * THREADS * gridDim.x;
    for (long long i = 1ll * THREADS * blockIdx.x + threadIdx.x; i < size; i += stride) {
        out[i] = x[i] > 0 ? x[i] + 1 : exp(x[i]);
    }
}

// One, the entries of a row, and products of those at `left` and `right`, squares over
// sqrt(2). A thread for each column; blocks: columns, rows.
extern "C" __global__ __launch_bounds__(THREADS, BLOCKS) void squares(
    const real* __restrict__ x, const int* __restrict__ left,
    const int* __restrict__ right, real* __restrict__ out, long long rows, long long d,
    long long width)
{
    const long long c = 1ll * THREADS * blockIdx.x + threadIdx.x;
    if (c >= width) {
        return;
    }
    const long long pair = c - 1 - d;
    const int a = pair < 0 ? 0 : left[pair], b = pair < 0 ? 0 : right[pair];
    const real root = a == b ? real(0.70710678118654752440) : real(1);
    for (long long i = blockIdx.y; i < rows; i += gridDim.y) {
        const real* row = x + i * d;
        real entry = 1;
        if (pair >= 0) {
            entry = row[a] * row[b] * root;
        } else if (c > 0) {
            entry = row[c - 1];
        }
        out[i * width + c] = entry;
    }
}

// Part c of parts, (parts, r, p), is the sum of right_j value_j^T over the keys edge[c]
// to edge[c + 1] - 1. Blocks: tiles of r, of p, parts.
extern "C" __global__ __launch_bounds__(THREADS, BLOCKS) void sum_chunks(
    const real* __restrict__ right, const real* __restrict__ value,
    const long long* __restrict__ edge, real* __restrict__ parts, long long r,
    long long p)
{
    __shared__ __align__(16) Tile features;
    __shared__ __align__(16) Tile values;
    const long long row = 1ll * TILE * blockIdx.x, column = 1ll * TILE * blockIdx.y;
    const long long end = edge[blockIdx.z + 1];
    real sum[UP][ACROSS] = {};
    for (long long j = edge[blockIdx.z]; j < end; j += DEPTH) {
        load(features, right, r, j, end, row, r);
        load(values, value, p, j, end, column, p);
        __syncthreads();
        accumulate(sum, features, values);
        __syncthreads();
    }
    store(parts + blockIdx.z * r * p, p, sum, row, r, column, p);
}

// Sums over keys become states: each is the state before times its decay, plus the
// chunk's own sum. A thread for each of `size` entries.
extern "C" __global__ __launch_bounds__(THREADS, BLOCKS) void add_up(
    real* __restrict__ parts, const real* __restrict__ state,
    const real* __restrict__ shrink, long long count, long long size)
{
    const long long i = 1ll * THREADS * blockIdx.x + threadIdx.x;
    if (i >= size) {
        return;
    }
    real sum = state[i];
    for (long long c = 0; c < count; ++c) {
        sum = sum * shrink[c] + parts[c * size + i];
        parts[c * size + i] = sum;
    }
}

// Answers of a chunk of TILE rows, from number lo + TILE * blockIdx.x on. Row i sees
// the keys before visible[i], its prefix length; `fade` is the decay of its chunk's
// state. Blocks: chunks, tiles of values.
extern "C" __global__ __launch_bounds__(THREADS, BLOCKS) void answer_chunks(
    const real* __restrict__ left, const real* __restrict__ right,
    const real* __restrict__ value, const real* __restrict__ states,
    const real* __restrict__ fade, const long long* __restrict__ visible,
    const long long* __restrict__ place, const long long* __restrict__ spot,
    real* __restrict__ out, long long lo, long long n, long long r, long long p,
    real rate)
{
    __shared__ __align__(16) Tile features;
    __shared__ __align__(16) Tile values;
    const long long first = lo + 1ll * TILE * blockIdx.x;
    const long long last = min(first + TILE, n), column = 1ll * TILE * blockIdx.y;
    const real* state = states + blockIdx.x * r * p;
    real sum[UP][ACROSS] = {};
    for (long long k = 0; k < r; k += DEPTH) {
        for (int t = threadIdx.x; t < TILE * DEPTH; t += THREADS) {
            const int a = t % DEPTH;
            const long long i = first + t / DEPTH;
            const bool inside = i < last && k + a < r;
            features[a][t / DEPTH] = inside ? left[i * r + k + a] * fade[i] : real(0);
        }
        load(values, state, p, k, r, column, p);
        __syncthreads();
        accumulate(sum, features, values);
        __syncthreads();
    }
    const long long end = visible[last - 1];
    for (long long j = visible[first]; j < end; j += DEPTH) {
        const long long count = min(end - j, 1ll * DEPTH);
        multiply_rows(
            features, values, left + first * r, right + j * r, nullptr, count,
            last - first, r);
        load(values, value, p, j, end, column, p);
        __syncthreads();
        for (int t = threadIdx.x; t < DEPTH * TILE; t += THREADS) {
            const int k = t / TILE;
            const long long i = first + t % TILE;
            const bool seen = i < last && j + k < min(end, visible[min(i, n - 1)]);
            const long long gap = seen ? place[i] - spot[j + k] : 0;
            const real weight = gap > 0 ? exp(rate * gap) : real(1);
            features[k][t % TILE] *= seen ? weight : real(0);
        }
        __syncthreads();
        accumulate(sum, features, values);
        __syncthreads();
    }
    store(out, p, sum, first, last, column, p);
}
