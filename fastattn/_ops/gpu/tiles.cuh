// Products of tiles in shared memory, 64 x 64 sums to a block of 128 threads.

typedef REAL real;

constexpr int THREADS = 128;
// of a multiprocessor: one that is enough, so that the compiler spills no registers
constexpr int BLOCKS = 1;
// a block computes TILE x TILE sums, DEPTH terms at a time; a thread UP x ACROSS
constexpr int TILE = 64;
constexpr int DEPTH = 32;
constexpr int UP = 8;
constexpr int ACROSS = 4;
constexpr int COLUMNS = TILE / ACROSS;
// keys that a thread multiplies rows with
constexpr int KEYS = DEPTH / COLUMNS;
// rows of a tile start in different banks and stay 16-byte aligned
constexpr int PAD = 16 / sizeof(real);

typedef real Tile[DEPTH][TILE + PAD];

__device__ real larger(real a, real b)
{
    return a > b ? a : b;
}

// the run-time compiler has no name for it
__device__ real lowest()
{
    return log(real(0));
}

// fills a tile with a part of a matrix of `height` rows, zeros beyond its edges
__device__ void load(
    Tile& tile, const real* matrix, long long stride, long long row, long long height,
    long long column, long long width)
{
    for (int t = threadIdx.x; t < DEPTH * TILE; t += THREADS) {
        const int k = t / TILE, c = t % TILE;
        const bool inside = row + k < height && column + c < width;
        tile[k][c] = inside ? matrix[(row + k) * stride + column + c] : real(0);
    }
}

__device__ void accumulate(real (&sum)[UP][ACROSS], const Tile& left, const Tile& right)
{
    const int up = threadIdx.x / COLUMNS * UP, across = threadIdx.x % COLUMNS * ACROSS;
#pragma unroll 8
    for (int k = 0; k < DEPTH; ++k) {
        for (int a = 0; a < UP; ++a) {
            for (int b = 0; b < ACROSS; ++b) {
                sum[a][b] += left[k][up + a] * right[k][across + b];
            }
        }
    }
}

// writes the sums to their place in a matrix of `height` rows and `width` columns
__device__ void store(
    real* matrix, long long stride, const real (&sum)[UP][ACROSS], long long row,
    long long height, long long column, long long width)
{
    row += threadIdx.x / COLUMNS * UP;
    column += threadIdx.x % COLUMNS * ACROSS;
    for (int a = 0; a < UP; ++a) {
        for (int b = 0; b < ACROSS; ++b) {
            if (row + a < height && column + b < width) {
                matrix[(row + a) * stride + column + b] = sum[a][b];
            }
        }
    }
}

__device__ real column_sum(const Tile& tile, int height, int column)
{
    real total = 0;
    for (int k = 0; k < height; ++k) {
        total += tile[k][column];
    }
    return total;
}

// Products of `height` rows, at most TILE, and `count` keys, at most DEPTH, come to
// `left`, a key to each of its rows. The keys are those of a list, or the first ones.
__device__ void multiply_rows(
    Tile& left, Tile& right, const real* query, const real* key, const long long* list,
    long long count, long long height, long long width)
{
    const int thread = threadIdx.x;
    const int up = thread / COLUMNS * UP, across = thread % COLUMNS * KEYS;
    real product[UP][KEYS] = {};
    for (long long l = 0; l < width; l += DEPTH) {
        for (int t = thread; t < TILE * DEPTH; t += THREADS) {
            const int i = t / DEPTH, k = t % DEPTH;
            const bool inside = i < height && l + k < width;
            left[k][i] = inside ? query[i * width + l + k] : real(0);
        }
        for (int t = thread; t < DEPTH * DEPTH; t += THREADS) {
            const int j = t / DEPTH, k = t % DEPTH;
            const bool inside = j < count && l + k < width;
            const long long row = inside && list ? list[j] : j;
            right[k][j] = inside ? key[row * width + l + k] : real(0);
        }
        __syncthreads();
#pragma unroll 8
        for (int k = 0; k < DEPTH; ++k) {
            for (int a = 0; a < UP; ++a) {
                for (int b = 0; b < KEYS; ++b) {
                    product[a][b] += left[k][up + a] * right[k][across + b];
                }
            }
        }
        __syncthreads();
    }
    for (int a = 0; a < UP; ++a) {
        for (int b = 0; b < KEYS; ++b) {
            left[across + b][up + a] = product[a][b];
        }
    }
}
