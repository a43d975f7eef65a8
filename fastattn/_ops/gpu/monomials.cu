// Monomials of rows, made in shared memory where they are multiplied.
//
// REAL is float or double. Coordinate c of row i is x[c * rows + i]. Monomial j is the
// product of the coordinates factor[start[j]] to factor[start[j + 1] - 1]: it depends
// on no other monomial, so every tile makes the monomials that it needs. The
// coordinates may be any functions of a row: lowrank.py gives powers.

#include "tiles.cuh"

// rows of one thread, which share the list of a monomial's factors
constexpr int SHARED = 4;
// monomials that a thread makes for each of those rows
constexpr int MADE = TILE * DEPTH / (THREADS * SHARED);

struct Recipe {
    const real* x;
    const int* start;
    const int* factor;
    long long rows;
    long long rank;
};

// monomial j of some rows times the factor `given` of each; zeros from `rank` on
template <int COUNT>
__device__ void monomial(
    real (&product)[COUNT], const real (&given)[COUNT], const int (&row)[COUNT],
    const Recipe& recipe, long long j)
{
    for (int s = 0; s < COUNT; ++s) {
        product[s] = j < recipe.rank ? given[s] : real(0);
    }
    if (j >= recipe.rank) {
        return;
    }
    const int stop = recipe.start[j + 1];
    for (int k = recipe.start[j]; k < stop; ++k) {
        const real* line = recipe.x + recipe.factor[k] * recipe.rows;
        for (int s = 0; s < COUNT; ++s) {
            product[s] *= line[row[s]];
        }
    }
}

// features[j * rows + i]: a thread for each row
extern "C" __global__ __launch_bounds__(THREADS, BLOCKS) void monomials(
    const real* __restrict__ x, const int* __restrict__ start,
    const int* __restrict__ factor, real* __restrict__ features, long long rows,
    long long rank)
{
    const int row[1] = {int(blockIdx.x * THREADS + threadIdx.x)};
    if (row[0] >= rows) {
        return;
    }
    const Recipe recipe = {x, start, factor, rows, rank};
    const real one[1] = {1};
    for (long long j = blockIdx.y; j < rank; j += gridDim.y) {
        real product[1];
        monomial(product, one, row, recipe, j);
        features[j * rows + row[0]] = product[0];
    }
}

// Sums of weight times monomial times value over `span` rows: parts is
// (spans, rank, p + 1), the last column without values. Blocks: tiles of monomials,
// tiles of values, spans.
extern "C" __global__ __launch_bounds__(THREADS, BLOCKS) void moments(
    const real* __restrict__ x, const real* __restrict__ weight,
    const real* __restrict__ value, const int* __restrict__ start,
    const int* __restrict__ factor, real* __restrict__ parts, long long rows,
    long long span, long long rank, long long p)
{
    constexpr int LANES = DEPTH / SHARED;
    __shared__ __align__(16) Tile left;
    __shared__ __align__(16) Tile right;
    const int thread = threadIdx.x, lane = thread % LANES, group = thread / LANES;
    const long long first = 1ll * TILE * blockIdx.x, column = 1ll * TILE * blockIdx.y;
    const long long begin = blockIdx.z * span, end = min(begin + span, rows);
    const Recipe recipe = {x, start, factor, rows, rank};
    real sum[UP][ACROSS] = {};
    real whole[MADE] = {};
    for (long long lo = begin; lo < end; lo += DEPTH) {
        int row[SHARED];
        real heavy[SHARED];
        for (int s = 0; s < SHARED; ++s) {
            const long long i = lo + lane + LANES * s;
            row[s] = int(min(i, end - 1));
            heavy[s] = i < end ? weight[i] : real(0);
        }
#pragma unroll
        for (int q = 0; q < MADE; ++q) {
            const int f = group + THREADS / LANES * q;
            real product[SHARED];
            monomial(product, heavy, row, recipe, first + f);
            for (int s = 0; s < SHARED; ++s) {
                left[lane + LANES * s][f] = product[s];
                whole[q] += product[s];
            }
        }
        load(right, value, p, lo, end, column, p);
        __syncthreads();
        accumulate(sum, left, right);
        __syncthreads();
    }
    real* part = parts + blockIdx.z * rank * (p + 1);
    store(part, p + 1, sum, first, rank, column, p);
    if (blockIdx.y > 0) {
        return;
    }
    for (int q = 0; q < MADE; ++q) {
        left[lane][group + THREADS / LANES * q] = whole[q];
    }
    __syncthreads();
    if (thread < TILE && first + thread < rank) {
        part[(first + thread) * (p + 1) + p] = column_sum(left, LANES, thread);
    }
}

// Products of the monomials of TILE rows and TILE columns of readout, (rank, p + 1);
// those with its last column are added to `right[0]`.
__device__ void products(
    real (&sum)[UP][ACROSS], Tile& left, Tile& right, const Recipe& recipe,
    const real* readout, long long first, long long column, long long p)
{
    constexpr int LANES = TILE / SHARED;
    const int thread = threadIdx.x, lane = thread % LANES, group = thread / LANES;
    const real ones[SHARED] = {1, 1, 1, 1};
    int row[SHARED];
    for (int s = 0; s < SHARED; ++s) {
        row[s] = int(min(first + lane + LANES * s, recipe.rows - 1));
    }
    real share[SHARED] = {};
    for (long long lo = 0; lo < recipe.rank; lo += DEPTH) {
#pragma unroll
        for (int q = 0; q < MADE; ++q) {
            const int f = group + THREADS / LANES * q;
            real product[SHARED];
            monomial(product, ones, row, recipe, lo + f);
            const bool inside = lo + f < recipe.rank;
            const real last = inside ? readout[(lo + f) * (p + 1) + p] : real(0);
            for (int s = 0; s < SHARED; ++s) {
                left[f][lane + LANES * s] = product[s];
                share[s] += product[s] * last;
            }
        }
        load(right, readout, p + 1, lo, recipe.rank, column, p);
        __syncthreads();
        accumulate(sum, left, right);
        __syncthreads();
    }
    for (int s = 0; s < SHARED; ++s) {
        left[group][lane + LANES * s] = share[s];
    }
    __syncthreads();
    if (thread < TILE) {
        right[0][thread] = column_sum(left, THREADS / LANES, thread);
    }
    __syncthreads();
}

// Products of monomials and readout: (rows, p + 1). Blocks: tiles of rows, of values.
extern "C" __global__ __launch_bounds__(THREADS, BLOCKS) void sums(
    const real* __restrict__ x, const real* __restrict__ readout,
    const int* __restrict__ start, const int* __restrict__ factor,
    real* __restrict__ out, long long rows, long long rank, long long p)
{
    __shared__ __align__(16) Tile left;
    __shared__ __align__(16) Tile right;
    const long long first = 1ll * TILE * blockIdx.x, column = 1ll * TILE * blockIdx.y;
    const long long row = first + threadIdx.x;
    real sum[UP][ACROSS] = {};
    products(sum, left, right, {x, start, factor, rows, rank}, readout, first, column, p);
    if (threadIdx.x < TILE && blockIdx.y == 0 && row < rows) {
        out[row * (p + 1) + p] = right[0][threadIdx.x];
    }
    store(out, p + 1, sum, first, rows, column, p);
}

// The same, divided by the last column. Blocks: tiles of rows, tiles of values.
extern "C" __global__ __launch_bounds__(THREADS, BLOCKS) void means(
    const real* __restrict__ x, const real* __restrict__ readout,
    const real* __restrict__ middle, const int* __restrict__ start,
    const int* __restrict__ factor, real* __restrict__ value, real* __restrict__ total,
    long long rows, long long rank, long long p)
{
    __shared__ __align__(16) Tile left;
    __shared__ __align__(16) Tile right;
    const int thread = threadIdx.x;
    const long long first = 1ll * TILE * blockIdx.x, column = 1ll * TILE * blockIdx.y;
    real sum[UP][ACROSS] = {};
    products(sum, left, right, {x, start, factor, rows, rank}, readout, first, column, p);
    if (thread < TILE && blockIdx.y == 0 && first + thread < rows) {
        total[first + thread] = right[0][thread];
    }
    for (int a = 0; a < UP; ++a) {
        const real whole = right[0][thread / COLUMNS * UP + a];
        const bool good = whole > 0 && isfinite(whole);
        for (int b = 0; b < ACROSS; ++b) {
            const long long c = column + thread % COLUMNS * ACROSS + b;
            const real shifted = good ? sum[a][b] / whole : real(0);
            sum[a][b] = shifted + (c < p ? middle[c] : real(0));
        }
    }
    store(value, p, sum, first, rows, column, p);
}
