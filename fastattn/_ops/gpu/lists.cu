// Softmax of rows over lists of keys, and the terms of first moments.
//
// REAL is float or double.

#include "tiles.cuh"

// threads that share a row of weights, and the weights of each
constexpr int SHARES = THREADS / TILE;
constexpr int OWN = DEPTH / SHARES;

// Statistics of the rows of a tile: the largest logit, the sum of weights relative to
// it, the sum of their squares times `rest`, and the factor by which the last keys
// rescaled earlier sums.
struct Rows {
    real peak[TILE], shrink[TILE], squares[TILE];
    double total[TILE];
    // of each share of a row
    real highs[SHARES][TILE], sums[SHARES][TILE], rests[SHARES][TILE];
};

// Logits of a tile become weights; all threads, with a barrier before and after.
__device__ void soften(
    Tile& weights, Rows& rows, const real* rest, const long long* list, long long count)
{
    const int row = threadIdx.x % TILE, share = threadIdx.x / TILE;
    real high = lowest();
    for (int k = share * OWN; k < (share + 1) * OWN && k < count; ++k) {
        high = larger(high, weights[k][row]);
    }
    rows.highs[share][row] = high;
    __syncthreads();
    const real before = rows.peak[row];
    high = before;
    for (int s = 0; s < SHARES; ++s) {
        high = larger(high, rows.highs[s][row]);
    }
    const real base = high > lowest() ? high : real(0);
    real sum = 0, squares = 0;
    for (int k = share * OWN; k < (share + 1) * OWN; ++k) {
        const real weight = k < count ? exp(weights[k][row] - base) : real(0);
        weights[k][row] = weight;
        sum += weight;
        if (rest && k < count) {
            squares += weight * weight * rest[list[k]];
        }
    }
    rows.sums[share][row] = sum;
    rows.rests[share][row] = squares;
    __syncthreads();
    if (share == 0) {
        const real shrink = exp(before - base);
        double total = rows.total[row] * shrink;
        squares = rows.squares[row] * shrink * shrink;
        for (int s = 0; s < SHARES; ++s) {
            total += rows.sums[s][row];
            squares += rows.rests[s][row];
        }
        rows.peak[row] = high;
        rows.shrink[row] = shrink;
        rows.total[row] = total;
        rows.squares[row] = squares;
    }
    __syncthreads();
}

// Online softmax of rows over lists of keys. Tile t of the rows is first[t] to last[t]
// - 1, and its keys list[bounds[block[t] * step]] to list[bounds[(block[t] + 1) * step]
// - 1]. Sums are relative to exp(peak); `squares` are of squared weights times `rest`,
// which may be null. Blocks: tiles of rows, tiles of values.
extern "C" __global__ __launch_bounds__(THREADS, BLOCKS) void attend_lists(
    const real* __restrict__ query, const real* __restrict__ key,
    const real* __restrict__ value, const real* __restrict__ rest,
    const long long* __restrict__ list, const long long* __restrict__ bounds,
    const long long* __restrict__ first, const long long* __restrict__ last,
    const long long* __restrict__ block, real* __restrict__ sums,
    real* __restrict__ peak, double* __restrict__ total, real* __restrict__ squares,
    long long width, long long p, long long step)
{
    __shared__ __align__(16) Tile left;
    __shared__ __align__(16) Tile right;
    __shared__ Rows rows;
    const int thread = threadIdx.x;
    const long long lo = first[blockIdx.x], hi = last[blockIdx.x];
    const long long r = block[blockIdx.x], column = 1ll * TILE * blockIdx.y;
    if (thread < TILE) {
        rows.peak[thread] = lowest();
        rows.total[thread] = 0;
        rows.squares[thread] = 0;
    }
    real sum[UP][ACROSS] = {};
    const long long end = bounds[(r + 1) * step];
    for (long long j = bounds[r * step]; j < end; j += DEPTH) {
        const long long* some = list + j;
        const long long count = min(end - j, 1ll * DEPTH);
        multiply_rows(left, right, query + lo * width, key, some, count, hi - lo, width);
        for (int t = thread; t < DEPTH * TILE; t += THREADS) {
            const int k = t / TILE, c = t % TILE;
            const bool inside = k < count && column + c < p;
            right[k][c] = inside ? value[some[k] * p + column + c] : real(0);
        }
        __syncthreads();
        soften(left, rows, rest, some, count);
        for (int a = 0; a < UP; ++a) {
            for (int b = 0; b < ACROSS; ++b) {
                sum[a][b] *= rows.shrink[thread / COLUMNS * UP + a];
            }
        }
        accumulate(sum, left, right);
        __syncthreads();
    }
    store(sums, p, sum, lo, hi, column, p);
    if (blockIdx.y == 0 && thread < TILE && lo + thread < hi) {
        peak[lo + thread] = rows.peak[thread];
        total[lo + thread] = rows.total[thread];
        squares[lo + thread] = rows.squares[thread];
    }
}

// Adds to each row of out, (rows, p), the sum over groups of its growth times its step
// times the first moments of its block. Tiles and blocks as above.
extern "C" __global__ __launch_bounds__(THREADS, BLOCKS) void add_first_moments(
    const real* __restrict__ growth, const real* __restrict__ step,
    const real* __restrict__ moment, const long long* __restrict__ first,
    const long long* __restrict__ last, const long long* __restrict__ block,
    real* __restrict__ out, long long groups, long long d, long long p)
{
    __shared__ __align__(16) Tile left;
    __shared__ __align__(16) Tile right;
    const long long lo = first[blockIdx.x], hi = last[blockIdx.x];
    const long long column = 1ll * TILE * blockIdx.y, depth = groups * d;
    const real* own = moment + block[blockIdx.x] * depth * p;
    real sum[UP][ACROSS] = {};
    for (long long k = 0; k < depth; k += DEPTH) {
        for (int t = threadIdx.x; t < TILE * DEPTH; t += THREADS) {
            const int a = t % DEPTH;
            const long long i = lo + t / DEPTH, g = (k + a) / d, l = (k + a) % d;
            const bool inside = i < hi && k + a < depth;
            left[a][t / DEPTH] =
                inside ? growth[i * groups + g] * step[i * d + l] : real(0);
        }
        load(right, own, p, k, depth, column, p);
        __syncthreads();
        accumulate(sum, left, right);
        __syncthreads();
    }
    const long long row = lo + threadIdx.x / COLUMNS * UP;
    const long long across = column + threadIdx.x % COLUMNS * ACROSS;
    for (int a = 0; a < UP; ++a) {
        for (int b = 0; b < ACROSS; ++b) {
            if (row + a < hi && across + b < p) {
                out[(row + a) * p + across + b] += sum[a][b];
            }
        }
    }
}
